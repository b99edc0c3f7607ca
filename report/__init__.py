"""Exporters for nbconvert: an executed notebook as a PDF and as a page.

    jupyter nbconvert --to report notebooks/02_coupling_math.ipynb

Python lays a notebook out as one plain cell for each thing that the reader
sees; pandoc reads these, filter.lua makes figures, links and formulas of
them, and Typst sets the PDF. `python -m report` binds all notebooks into one.
"""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote
from xml.etree import ElementTree

import nbformat
import PIL.Image
import pypandoc
import typst
from nbconvert.exporters import Exporter
from nbconvert.filters import strip_ansi
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbconvert.utils.exceptions import ConversionException as Refused
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from traitlets import Enum, Integer, List, Unicode

HERE = Path(__file__).parent
KINDS = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpeg"}
FILES = "filter.lua", "template.typ", "page.html"
PANDOC = [  # in the sandbox it reads what its command line names, no more
    pypandoc.get_pandoc_path(), "--sandbox", "--from=ipynb-raw_html+smart",
    "--columns=9999", "--wrap=preserve", "--eol=lf",
    "--lua-filter=filter.lua",
]  # fmt: skip


def brief(value):
    """As a message shows it: a line of printable characters."""
    line = "".join(c if c.isprintable() else " " for c in str(value))
    return line if len(line) < 300 else line[:300] + " ..."


def check(notebook, name):
    """Its structure, of which Jupyter only logs what is wrong."""
    try:
        nbformat.validate(notebook, relax_add_props=True)
    except nbformat.ValidationError as error:
        path = [*(error.absolute_path or ())]
        cell = f", cell {path[1] + 1}" if path[:1] == ["cells"] else ""
        what = f"must be a notebook, but {brief(error.message)}"
        raise Refused(f"{name}{cell} {what}") from None


def format_of(data):
    """Of a picture that is whole and loads no other; or None."""
    known = "PNG", "JPEG", "GIF", "WEBP"
    try:
        with PIL.Image.open(io.BytesIO(data), formats=known) as picture:
            picture.load()
            return picture.format.lower()
    except PIL.UnidentifiedImageError:
        try:
            root = ElementTree.fromstring(data)
        except (ElementTree.ParseError, ValueError, LookupError):
            return None
    except Exception:  # Pillow has many names for a damaged file
        return None
    outside = [
        link for part in root.iter() for name, link in part.items()
        if name.endswith("href") and not part.tag.endswith("}a")
        and not link.startswith(("#", "data:"))
    ]  # fmt: skip
    drawn = root.tag == "{http://www.w3.org/2000/svg}svg"
    return "svg+xml" if drawn and not outside else None


def decode(text):
    """Base64; b"" of what is none."""
    try:
        return base64.b64decode("".join(text))
    except (TypeError, ValueError):
        return b""


def uneven(text):
    """The first row of a table with other cells than its head, as a | or a
    line break in a cell makes one; or None. Code and formulas aside."""
    text = re.sub(r"(?s)(`+)(?!`).*?(?<!`)\1(?!`)|\\.|\$[^$]*\$", "x", text)
    cells, above = None, ""
    for row in text.split("\n"):
        inner = row.strip().removeprefix("|").removesuffix("|")
        rule = re.fullmatch(r" *\|?( *:?-+:? *\|)+( *:?-+:? *)?", row)
        if rule or not row.strip():
            cells = above if rule else None
        elif cells not in (None, inner.count("|")):
            return row
        above = inner.count("|")
    return None


class ReportExporter(Exporter):
    """A notebook as a PDF."""

    export_from_notebook = "Report (PDF)"
    output_mimetype = "application/pdf"
    file_extension = Unicode(".pdf")
    preprocessors = List([CoalesceStreamsPreprocessor]).tag(config=True)
    code = Enum(["teach", "all", "none"], "teach").tag(config=True)
    patience = Integer(300, help="for pandoc, in seconds").tag(config=True)
    writer = [
        "--to=typst", "--template=template.typ",
        "--extract-media=.", "--syntax-highlighting=idiomatic",
    ]  # fmt: skip

    def from_notebook_node(self, nb, resources=None, **kw):
        """A notebook's own metadata say nothing here; __main__.py says what
        it has to in resources["report"]."""
        about = (resources or {}).get("metadata", {})
        name = os.fsencode(about.get("name") or "notebook")
        name = brief(name.decode("utf-8", "replace"))
        self.book = f"{name}.ipynb"
        check(nb, self.book)
        try:
            nb = new_notebook(cells=nb.cells)
            nb, resources = super().from_notebook_node(nb, resources, **kw)
        except RecursionError:
            raise Refused(f"{self.book} is nested too deep") from None
        self.folder = Path(os.path.realpath(about.get("path") or os.curdir))
        report = {"pagetitle": name, "places": {}, "code": self.code}
        report |= resources.get("report", {})
        copies = os.environ.get("FIGURES", "figures")
        copies = report.pop("figures", copies and HERE.parent / copies)
        self.copies, places = copies, report.pop("places")
        cells, token = [], os.urandom(4).hex()  # an id that none can guess
        for number, cell in enumerate(nb.cells, 1):
            place = places.get(cell.get("id"), (self.book, number, None))
            where = "{}, cell {}".format(*place)
            for part in self.lay_out(cell, where, place[2]):
                part.metadata |= {"where": where, "notebook": place[0]}
                part.id = f"{token}-{len(cells)}"
                cells.append(part)
        cells = self.arrange(cells, token)
        with tempfile.TemporaryDirectory(prefix="report-") as work:
            for file in FILES:  # their own path may not be of the locale
                shutil.copy(HERE / file, work)
            self.add_pictures(cells, work)
            options = "--standalone", *self.writer
            text = self.pandoc(cells, work, *options, report=report)
            return self.finish(Path(work), text, cells), resources

    def arrange(self, cells, token):
        """On paper the answers to a notebook's questions stand at the end."""
        late = [c for c in cells if c.metadata.get("kind") == "answers"]
        rest = [c for c in cells if c not in late]
        for k, cell in enumerate(late):
            number = re.match(r"0*(\d*)", cell.metadata["notebook"])[1]
            title = "# Answers\n\n" * (k == 0) + f"## Notebook {number}"
            about = {"where": cell.metadata["where"], "notebook": "answers"}
            head = new_markdown_cell(title, metadata=about, attachments={})
            head.id = f"{token}-answers-{k}"
            rest += [head, cell]
        return rest

    def pandoc(self, cells, work, *options, **about):
        """What pandoc writes of cells."""
        flat = new_notebook(cells=cells, metadata=about)
        flat = json.dumps(flat, ensure_ascii=False)
        try:
            run = subprocess.run(
                [*PANDOC, *options], input=flat.encode("utf-8", "replace"),
                cwd=work, capture_output=True, timeout=self.patience,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            for cell in cells[1:] and cells:
                self.pandoc([cell], work, "--to=native")
            where = self.book if cells[1:] else cells[0].metadata["where"]
            what = f"pandoc took over {self.patience} s"
            raise Refused(f"{where}: {what}") from None
        said = run.stderr.decode("utf-8", "replace")
        if run.returncode:
            found = re.findall(r"REFUSED (.*)", said)
            raise Refused(found[-1] if found else f"{self.book}: {said}")
        return run.stdout.decode()

    def add_pictures(self, cells, work):
        """To each cell those that it shows, of its attachments and of the
        files in the notebook's folder."""
        for cell in cells:
            row = "attachments" in cell and uneven(cell.source)
            if row:
                what = "must have as many cells as its head"
                raise Refused(
                    f"{cell.metadata['where']}: a row of a table {what}, "
                    f"got {brief(row)}"
                )
        cells = {cell.id: cell for cell in cells if "![" in cell.source}
        bare = [
            new_markdown_cell(cell.source, id=key)
            for key, cell in cells.items()
            if "attachments" in cell
        ]
        listed = self.pandoc(bare, work, "--to=plain") if bare else ""
        found = {key: {} for key in cells}
        for key, source in map(json.loads, filter(None, listed.split("\n"))):
            cell, name = cells[key], unquote(source)
            if name.startswith(f"{key}-"):
                name = name.removeprefix(f"{key}-")
                bundle = cell.attachments.get(name, {})
                data = decode(next(iter(bundle.values()), ""))
            else:
                data = self.read(name)
            kind = format_of(data)
            if not kind:
                raise Refused(
                    f"{cell.metadata['where']}: a picture must be attached or "
                    "in the notebook's folder, be SVG, PNG, JPEG, GIF or WEBP "
                    f"and whole, and load no other, got {brief(name)}"
                )
            file = f"{len(found[key])}.{kind.partition('+')[0]}"
            data = base64.b64encode(data).decode()
            found[key][source] = file, {f"image/{kind}": data}
        for key, pictures in found.items():
            if "attachments" in cells[key]:
                cells[key].attachments = dict(pictures.values())
                files = {k: f"{key}-{v[0]}" for k, v in pictures.items()}
                cells[key].metadata["pictures"] = files

    def read(self, name):
        """A file below the notebook's folder; b"" of what is none. A name
        is judged as on Windows too, before any disk or host is asked."""
        parts = PureWindowsPath(name)
        if parts.anchor or ".." in parts.parts:
            return b""
        try:
            name = os.fsdecode(name.encode())  # on disk in UTF-8
            path = Path(os.path.realpath(self.folder / name))
            inside = path.is_relative_to(self.folder) and path.is_file()
            return path.read_bytes() if inside else b""
        except (OSError, ValueError):
            return b""

    def lay_out(self, cell, where, kind):
        """One cell for each thing that the reader of the report sees."""
        tags = cell.metadata.get("tags", ())
        if cell.cell_type == "markdown":
            if self.code != "none" or "about-code" not in tags:
                attached = cell.get("attachments", {})
                about, text = {}, cell.source
                if "answers" in tags:  # what unfolds in Jupyter
                    about = {"kind": "answers"}
                    text = re.sub(
                        r"</?details>|<summary>.*</summary>", "", text
                    )
                yield new_markdown_cell(
                    text, metadata=about, attachments=attached
                )
        if not cell.source.strip():
            return
        if cell.cell_type == "raw":
            yield new_code_cell(cell.source, metadata={"kind": "printed"})
        if cell.cell_type != "code":
            return
        if cell.execution_count is None:
            raise Refused(f"{where} was not executed:\n{cell.source}")
        if self.code != "none" and kind != "summary":
            text = re.sub(r"\A(#\s*NBVAL_\w+\n)+", "", cell.source).strip("\n")
            hidden = self.code == "teach" and "hide-input" in tags
            kind = "fold" if hidden else "code"
            yield new_code_cell(text, metadata={"kind": kind})
        caption = None
        for output in cell.outputs:
            about = output.get("metadata", {})
            if output.output_type == "error":
                what = f"{output.ename}: {output.evalue}"
                raise Refused(f"{where} ended in an error: {what}")
            said = output.get("data", {}).get("text/markdown")
            words = re.sub(r"^\*Figure \d+\.\d+\. ", "*", said or "")
            if not about.get("figure_caption") or words != f"*{caption}*":
                yield from self.show(output, about, where)
            caption = about.get("caption", caption)

    def show(self, output, about, where):
        """An output in the best form that it has."""
        data = output.get("data", {"text/plain": output.get("text")})
        text = data.get("text/markdown", data.get("text/latex"))
        if any(mime in data for mime in KINDS):
            yield self.picture(data, about, where)
        elif text:  # 0.1 [0.0, 0.2] and × 0.1 are not broken
            interval = r"(?<=\d) \[([-.\w]+), ([-.\w]+\])"
            text = re.sub(interval, "\xa0[\\1,\xa0\\2", text)
            text = re.sub(r"× (?=\d)", "×\xa0", text)
            yield new_markdown_cell(text, attachments={})
        elif output.get("name") != "stderr" and "widget" not in str([*data]):
            text = data.get("text/plain", "(shown in a browser only)")
            if text := strip_ansi(text).strip("\n"):
                yield new_code_cell(text, metadata={"kind": "printed"})

    def picture(self, data, about, where):
        """As the notebook has it, or as its vector copy where the digest in
        the notebook says that both are of one run."""
        name = about.get("figure")
        ours = isinstance(name, str) and re.fullmatch(r"[\w-]+", name)
        copy = ours and self.copies and self.copies / f"{name}.svg"
        vector = copy.read_bytes() if copy and copy.is_file() else b""
        digest = hashlib.sha256(vector).hexdigest()[:16]
        if vector and digest == about.get("svg"):
            data = {"image/svg+xml": vector.decode()}
        mime = next(mime for mime in KINDS if mime in data)
        data = data[mime]
        if mime == "image/svg+xml":
            data = base64.b64encode(data.encode("utf-8", "replace")).decode()
        file = f"output.{KINDS[mime]}"
        text = f"![](attachment:{file})\n\n{about.get('caption', '')}"
        cell = new_markdown_cell(text, attachments={file: {mime: data}})
        if ours:
            frames = about.get("frames", [])
            for frame in frames if isinstance(frames, list) else ["a list"]:
                png = frame.get("png") if isinstance(frame, dict) else ""
                if format_of(decode(png)) != "png" or "label" not in frame:
                    what = f"must have a label and a PNG, got {brief(frame)}"
                    raise Refused(f"{where}: a frame of {name} {what}")
            cell.metadata = {"kind": "figure", "figure": name}
            cell.metadata["frames"] = frames
        return cell

    def finish(self, work, text, cells):
        """A PDF; of the same text the same bytes."""
        path = work / "report.typ"
        path.write_text(text, encoding="utf-8")
        try:
            return typst.compile(path, ignore_system_fonts=True, timestamp=0)
        except typst.TypstError as error:
            line = re.search(r"report\.typ:(\d+)", error.diagnostic)
            above = text.split("\n")[: int(line[1]) if line else 0]
            where = {f"// {cell.id}": cell.metadata["where"] for cell in cells}
            where = [self.book, *(where[a] for a in above if a in where)][-1]
            raise Refused(f"{where}: Typst says {error.diagnostic}") from None


class ReportHTMLExporter(ReportExporter):
    """A notebook as one page that needs no other file."""

    export_from_notebook = "Report (HTML)"
    output_mimetype = "text/html"
    file_extension = Unicode(".html")
    writer = [
        "--to=html5", "--mathml", "--toc", "--toc-depth=2",
        "--embed-resources", "--variable=document-css=true",
        "--include-after-body=page.html",
    ]  # fmt: skip

    def arrange(self, cells, token):
        """On the screen they unfold where the questions are."""
        return cells

    def finish(self, work, text, cells):
        """With its own style; the browser runs and loads nothing else."""
        script = text.rpartition("<script>")[2].partition("</script>")[0]
        digest = hashlib.sha256(script.encode()).digest()
        policy = ("default-src 'none'; img-src data:; style-src "
                  "'unsafe-inline'; script-src 'sha256-"
                  f"{base64.b64encode(digest).decode()}'")  # fmt: skip
        style = (HERE / "style.css").read_text(encoding="utf-8")
        head = (
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        )
        head += f"\n<style>\n{style}</style>\n</head>"
        text = text.replace("</nav>", "</nav>\n<main>", 1)
        text = text.replace("<dialog", "</main>\n<dialog", 1)
        return text.replace("</head>", head, 1)
