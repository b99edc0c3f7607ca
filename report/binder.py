"""Executed notebooks as one document of pandoc's, and that as PDF and HTML.

Every cell is read by pandoc on its own, as text: no markup of pandoc's,
Typst's or HTML's own in it means anything. What comes of that is bound, as
pandoc's tree, into one document, and written twice: as Typst, which becomes
the PDF, and as HTML, with everything that it shows inside it.
"""

import base64
import copy
import hashlib
import json
import re
from pathlib import Path
from urllib.parse import unquote

import typst
from pictures import data_uri, inches, lighter
from tree import (
    ReportError,
    attr,
    element,
    image,
    pandoc,
    text_of,
    tidy,
    walk,
    words,
)

HERE = Path(__file__).parent
TITLE = "Density estimation in two dimensions"
SUBTITLE = (
    "Kernels and normalizing flows: four notebooks, "
    "every fit scored against the truth"
)
COVER = "03_overview.svg"
PICTURES = {
    "image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg",
}  # fmt: skip
WIDGET = "application/vnd.jupyter.widget-view+json"


# From notebooks to parts: (kind, content) in the order of the page.


def label(path, number):
    return f"{path.name}, cell {number}"


def first_line(source):
    return source.strip().split("\n")[0]


def join_formulas(text):
    """Display formulas on one line, as Jupyter takes them out before it
    reads the rest: a line of one that starts with - is no list. Bare
    environments become display formulas."""
    pattern = re.compile(
        r"^ {0,3}(?P<fence>```+|~~~+).*?(?:^ {0,3}(?P=fence)|\Z)"
        r"|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"
        r"|\$\$(?P<tex>.+?)\$\$"
        r"|(?P<env>\\begin\{(?P<name>(?:align|gather|equation)\*?)\}"
        r".+?\\end\{(?P=name)\})",
        re.S | re.M,
    )

    def join(match):
        tex = match["tex"] or match["env"]
        if tex is None:
            return match[0]
        tex = re.sub(r"(?<!\\)%.*", "", tex)  # comments
        return f"$${' '.join(tex.split())}$$"

    return pattern.sub(join, text)


def printed(text):
    """What a terminal would have left on the screen."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return "\n".join(
        line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")
    )


def output_parts(outputs, where):
    """Parts of a cell's outputs, each in the best form that it has."""
    caption_shown, said = False, ""
    for output in [*outputs, None]:
        if output and output.output_type == "stream":
            said += output.text if output.name == "stdout" else ""
            continue
        if said.strip():  # however many pieces the kernel made of it
            yield "printed", printed(said)
        said = ""
        if output is None:
            return
        if output.output_type == "error":
            raise ReportError(
                f"{where} ended in an error: {output.ename}: {output.evalue}"
            )
        data, about = output.data, output.metadata
        repeats, caption_shown = caption_shown, False
        if WIDGET in data or repeats and about.get("figure_caption"):
            continue
        pictures = [mime for mime in PICTURES if mime in data]
        if about.get("figure"):
            yield "figure", output
            caption_shown = True
        elif pictures:
            yield "picture", (data[pictures[0]], PICTURES[pictures[0]])
        elif "text/markdown" in data:
            yield "markdown", join_formulas(data["text/markdown"])
        elif "text/latex" in data:
            yield "markdown", join_formulas(data["text/latex"])
        elif "<table" in data.get("text/html", ""):
            yield "html", data["text/html"]
        elif "text/plain" in data:
            yield "printed", printed(data["text/plain"])


def parts_of(path, notebook, with_code):
    for number, cell in enumerate(notebook.cells, 1):
        where = label(path, number)
        if cell.cell_type == "markdown":
            yield "markdown", join_formulas(cell.source)
        elif cell.cell_type == "code" and cell.source.strip():
            if cell.execution_count is None:
                raise ReportError(
                    f"{where} was not executed: {first_line(cell.source)}"
                )
            if with_code:
                yield "code", cell.source.strip("\n")
            yield from output_parts(cell.outputs, where)


# From parts to pandoc's tree.


class Binder:
    """One document of many notebooks: its blocks, and the files beside."""

    def __init__(self, notebooks, figures, work, with_code):
        """notebooks: {path: notebook}. figures: where theirs are kept."""
        self.figures, self.work = figures, work
        self.folder = next(iter(notebooks)).parent
        self.notebooks = notebooks
        self.parts = {
            path: list(parts_of(path, notebook, with_code))
            for path, notebook in notebooks.items()
        }
        self.assets, self.anchors, self.references = {}, {}, {}
        self.taken, self.count = set(), 0

    def read(self):
        """What pandoc makes of every piece of text, asked once for all."""
        pieces = []
        for kind, content in sum(self.parts.values(), []):
            if kind in ("markdown", "html"):
                pieces.append((kind, content))
            elif kind == "figure":
                about = content.metadata
                pieces.append(("markdown", about.get("caption", "")))
                pieces += [
                    ("markdown", frame.get("text", ""))
                    for frame in about.get("frames", ())
                ]
        pieces = list(dict.fromkeys(pieces))
        source = json.dumps([{"kind": k, "text": t} for k, t in pieces])
        tree = pandoc(source, "--from=reader.lua", "--to=json")
        self.version = json.loads(tree)["pandoc-api-version"]
        divs = json.loads(tree)["blocks"]
        self.trees = {
            piece: walk(div["c"][1], tidy)
            for piece, div in zip(pieces, divs, strict=True)
        }

    def asset(self, data, kind):
        """The name of a picture's file beside the document."""
        data = lighter(data, kind)
        name = f"{hashlib.sha256(data).hexdigest()[:16]}.{kind}"
        self.assets[name] = data
        (self.work / name).write_bytes(data)
        return name

    def picture(self, data, kind, alt=""):
        """An image, as wide as its own resolution says."""
        width = None
        if kind != "svg":
            width = f"{inches(data):.3f}in"
        return image(self.asset(data, kind), width, alt)

    def figure(self, output):
        """A numbered figure; on the screen a slider, where it has frames."""
        about = output.metadata
        name = about["figure"]
        if not re.fullmatch(r"[\w-]+", name):
            raise ReportError(f"{name!r} is no name of a figure")
        self.count += 1
        caption = self.trees["markdown", about.get("caption", "")]
        caption = copy.deepcopy(caption)
        alt = text_of(caption) or name
        number = element("Strong", words(f"Figure {self.count}:"))
        if caption and caption[0]["t"] in ("Para", "Plain"):
            caption[0]["c"][:0] = [number, {"t": "Space"}]
        else:
            caption = [element("Plain", [number]), *caption]
        still = self.still(name, output, alt)
        body = [element("Plain", [still])]
        if about.get("frames"):
            body = [
                element("Div", attr("", "page"), body),
                element("Div", attr("", "screen"), self.slider(about, alt)),
            ]
        place = attr(f"figure-{self.count}")
        return [element("Figure", place, [None, caption], body)]

    def still(self, name, output, alt):
        """The vector copy; the pixels in the notebook, where it is gone."""
        vector = self.figures / f"{name}.svg"
        if vector.exists():
            return self.picture(vector.read_bytes(), "svg", alt)
        if "image/png" not in output.data:
            raise ReportError(f"no figure {vector}")
        data = base64.b64decode(output.data["image/png"])
        return self.picture(data, "png", alt)

    def slider(self, about, alt):
        """Every frame with its label and text; report.js moves them."""
        last = len(about["frames"]) - 1
        play = '<button type="button">Play</button>' if last > 11 else ""
        controls = (
            f'<div class="controls" hidden>{play}<input type="range" min="0"'
            f' max="{last}" value="0" step="1" aria-label="Frame of figure '
            f'{self.count}"><output></output></div>'
        )
        blocks = [element("RawBlock", "html", controls)]
        for k, frame in enumerate(about["frames"]):
            path = self.figures / f"{about['figure']}-{k:02d}.png"
            if not path.exists():
                raise ReportError(f"no frame {path}")
            name = str(frame.get("label", k))
            shown = self.picture(path.read_bytes(), "png", f"{name}: {alt}")
            place = attr("", "frame", label=name)
            if k:
                place[2].append(["hidden", "hidden"])
            text = self.trees["markdown", frame.get("text", "")]
            text = element("Div", attr("", "text"), text)
            content = [element("Plain", [shown]), text]
            blocks.append(element("Div", place, content))
        return [element("Div", attr("", "frames"), blocks)]

    def blocks_of(self, kind, content):
        """A part as blocks of the tree."""
        if kind in ("markdown", "html"):
            return self.trees[kind, content]
        if kind == "code":
            return [element("CodeBlock", attr("", "python"), content)]
        if kind == "printed":
            text = content.strip("\n")
            return [element("CodeBlock", attr("", "output"), text)]
        if kind == "figure":
            return self.figure(content)
        data, suffix = content
        raw = data.encode() if suffix == "svg" else base64.b64decode(data)
        return [element("Para", [self.picture(raw, suffix)])]

    def identifier(self, *names):
        """One that no heading of any notebook has yet."""
        slug = re.sub(r"\W+", "-", " ".join(names)).strip("-").lower()
        name, k = slug, 2
        while name in self.taken:
            name, k = f"{slug}-{k}", k + 1
        self.taken.add(name)
        return name

    def chapter(self, path):
        """A notebook's blocks: its title the only heading of level 1, its
        headings known by Jupyter's anchors, its references set aside."""
        blocks, in_references, titled = [], False, False
        parts = self.parts[path]
        for block in sum((self.blocks_of(*part) for part in parts), []):
            if block["t"] == "Header":
                block = copy.deepcopy(block)
                level, _, content = block["c"]
                text = text_of(content).strip()
                in_references = text == "References"
                if in_references:
                    continue
                name = self.identifier(path.stem, text)
                for form in text, text_of(content, "$").strip():
                    form = form.replace("\u2019", "'")  # as it was typed
                    anchor = path.name, form.replace(" ", "-")
                    self.anchors.setdefault(anchor, name)
                if level == 1 and not titled:
                    self.anchors[path.name, ""] = name
                depth = max(level, 2) if titled else level
                titled = titled or level == 1
                block["c"] = [depth, attr(name), content]
            if in_references:
                self.add_references(path, block)
            else:
                blocks.append(block)
        if not titled:
            raise ReportError(f"{path.name} has no title: a line '# …'")
        return blocks

    def add_references(self, path, block):
        """Entries [n] … of a list, or of paragraphs."""
        if block["t"] in ("BulletList", "OrderedList"):
            items = block["c"] if block["t"] == "BulletList" else block["c"][1]
            for inner in sum(items, []):
                self.add_references(path, inner)
            return
        entry = block["c"] if block["t"] in ("Para", "Plain") else [block]
        found = re.match(r"\[(\d+)\]\s*(\S.*)", text_of(entry), re.S)
        if not found or entry[0].get("c") != f"[{found[1]}]":
            raise ReportError(
                f"{path.name}: no reference '[n] …': {text_of(entry)[:60]}"
            )
        starts = [
            k for k, item in enumerate(entry)
            if item["t"] == "Str" and re.fullmatch(r"\[\d+\]", item["c"])
            and entry[k - 1]["t"] in ("SoftBreak", "LineBreak")
        ]  # fmt: skip
        for start, end in zip([0, *starts], [*starts, None], strict=True):
            number = int(entry[start]["c"][1:-1])
            content = entry[start + 2 : end]
            while content and content[-1]["t"].endswith("Break"):
                content = content[:-1]
            held, other = self.references.setdefault(number, (content, path))
            if text_of(held).split() != text_of(content).split():
                raise ReportError(
                    f"reference [{number}] differs in {other.name} and "
                    f"{path.name}"
                )

    def bibliography(self):
        """The chapter of all notebooks' references."""
        if not self.references:
            return []
        title = element("Header", 1, attr("references"), words("References"))
        blocks = [title]
        for number, (content, _) in sorted(self.references.items()):
            place = attr(f"ref-{number}", "reference", number=number)
            start = words(f"[{number}]") + [{"t": "Space"}]
            blocks.append(
                element("Div", place, [
                    element("Div", attr("", "page"), [
                        element("Para", content)
                    ]),
                    element("Div", attr("", "screen"), [
                        element("Para", start + content)
                    ]),
                ])
            )  # fmt: skip
        return blocks

    def cite(self, path, content):
        """Each number of '[3, 5]' as a link to its entry."""
        text, done = text_of(content), []
        if not re.fullmatch(r"\[?\s*\d+(\s*[,–-]\s*\d+)*\s*\]?", text):
            return [element("Link", attr(), content, ["#references", ""])]
        for piece in re.findall(r"\d+|\D+", text):
            if not piece.isdigit():
                done += words(piece)
                continue
            if int(piece) not in self.references:
                raise ReportError(f"{path.name} cites [{piece}]: no entry")
            target = [f"#ref-{int(piece)}", ""]
            done.append(element("Link", attr(), words(piece), target))
        return done

    def resolve(self, path):
        """What change a notebook's links and images need."""

        def change(item):
            if item["t"] == "Image" and item["c"][2][0] not in self.assets:
                return [self.local_image(path, item)]
            if item["t"] != "Link":
                return [item]
            _, content, (target, _) = item["c"]
            if re.match(r"(https?://|mailto:)", target):
                return [item]
            place, _, anchor = target.partition("#")
            place, anchor = unquote(place) or path.name, unquote(anchor)
            if re.match(r"\w[\w+.-]*:", place):
                raise ReportError(f"{path.name} links to {target}")
            if not place.endswith(".ipynb"):
                return content  # a file of the repository
            if anchor == "References" and self.references:
                return self.cite(path, content)
            found = self.anchors.get((place.removeprefix("./"), anchor))
            if found is None:
                raise ReportError(f"{path.name} links to no place: {target}")
            return [element("Link", attr(), content, [f"#{found}", ""])]

        return change

    def local_image(self, path, item):
        """An image of a Markdown cell: an attachment, or a file."""
        _, alt, (target, _) = item["c"]
        name = unquote(target)
        kind = Path(name).suffix[1:].lower().replace("jpeg", "jpg")
        if kind not in PICTURES.values() or re.match(r"\w+://", name):
            raise ReportError(f"{path.name} shows what is no image: {target}")
        if name.startswith("attachment:"):
            name = name.removeprefix("attachment:")
            for cell in self.notebooks[path].cells:
                for data in cell.get("attachments", {}).get(name, {}).values():
                    raw = base64.b64decode(data)
                    return self.picture(raw, kind, text_of(alt))
        if not (self.folder / name).is_file():
            raise ReportError(f"{path.name} shows no file: {target}")
        data = (self.folder / name).read_bytes()
        return self.picture(data, kind, text_of(alt))

    def document(self):
        """The whole tree."""
        self.read()
        chapters = {path: self.chapter(path) for path in self.parts}
        blocks = []
        for path, chapter in chapters.items():
            blocks += walk(chapter, self.resolve(path))
        for number, (content, path) in self.references.items():
            content = walk(content, self.resolve(path))
            self.references[number] = content, path
        meta = {"title": TITLE, "subtitle": SUBTITLE, "pagetitle": TITLE}
        meta = {k: element("MetaInlines", words(v)) for k, v in meta.items()}
        if (self.figures / COVER).exists():
            data = (self.figures / COVER).read_bytes()
            cover = [self.picture(data, "svg", "An overview of the fits")]
            meta["cover"] = element("MetaInlines", cover)
        return {
            "pandoc-api-version": self.version,
            "meta": meta,
            "blocks": blocks + self.bibliography(),
        }

    def write(self, tree, target, *options):
        """The tree in another format; a formula that has no place in it is
        refused with the name of its notebook."""
        try:
            return pandoc(
                json.dumps(tree), "--from=json", f"--to={target}",
                "--standalone", "--lua-filter=filter.lua", "--wrap=preserve",
                *options,
            )  # fmt: skip
        except ReportError as error:
            found = re.search(r"REFUSED (.*?): (.*)", str(error))
            if not found:
                raise
            where = ""
            for path, parts in self.parts.items():
                texts = [str(text) for kind, text in parts if kind != "code"]
                if found[2] in " ".join(" ".join(texts).split()):
                    where = f"{path.name}: "
            raise ReportError(f"{where}{found[1]}: {found[2]}") from None

    def pdf(self, tree):
        source = self.work / "report.typ"
        text = self.write(
            tree, "typst", "--template=template.typ",
            "--syntax-highlighting=idiomatic",
        )  # fmt: skip
        source.write_text(text)
        try:
            return typst.compile(
                source, root=self.work, ignore_system_fonts=True, timestamp=0
            )
        except typst.TypstError as error:
            raise ReportError(f"typst: {error}") from None

    def html(self, tree):
        """Pictures, style and script inside: nothing is fetched."""

        def embed(item):
            if item["t"] == "Image":
                name = item["c"][2][0]
                kind = name.rpartition(".")[2]
                item["c"][2] = [data_uri(self.assets[name], kind), ""]
            return [item]

        tree = walk(tree, embed)
        for key, name in ("style", "style.css"), ("script", "report.js"):
            raw = element("RawInline", "html", (HERE / name).read_text())
            tree["meta"][key] = element("MetaInlines", [raw])
        return self.write(
            tree, "html5", "--mathml", "--toc", "--toc-depth=2",
            "--template=template.html",
        ).encode()  # fmt: skip
