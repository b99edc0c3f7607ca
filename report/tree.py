"""Pandoc, and the tree of a document as its JSON has it."""

import re
import subprocess
from pathlib import Path

import pypandoc

HERE = Path(__file__).parent
NUMBER = re.compile(r"(?=.*\d|nan|inf)[-−+±\d.,:%einaf∞()\[\] ]+", re.I)


class ReportError(Exception):
    """What the reader of the message can mend."""


def text_of(node, dollar=""):
    """The words of a tree, its formulas as TeX between dollars, or bare."""
    if isinstance(node, list):
        return "".join(text_of(item, dollar) for item in node)
    if not isinstance(node, dict):
        return ""
    kind, content = node.get("t"), node.get("c")
    if kind in ("Space", "SoftBreak", "LineBreak"):
        return " "
    if kind == "Math":
        return f"{dollar}{content[1]}{dollar}"
    if kind in ("Str", "Code", "CodeBlock"):
        return content if kind == "Str" else content[1]
    return text_of(content, dollar)


def walk(node, change):
    """A copy where each element, innermost first, is the list change(it)."""
    if isinstance(node, dict):
        return {key: walk(value, change) for key, value in node.items()}
    if not isinstance(node, list):
        return node
    done = []
    for item in (walk(item, change) for item in node):
        if isinstance(item, dict) and "t" in item:
            done += change(item)
        else:
            done.append(item)
    return done


def element(kind, *content):
    return {"t": kind, "c": content[0] if len(content) == 1 else [*content]}


def attr(name="", *classes, **pairs):
    """An identifier, classes, and key-value pairs."""
    return [name, list(classes), [[k, str(v)] for k, v in pairs.items()]]


def words(text):
    return [element("Str", text)]


def image(name, width, alt=""):
    pairs = {"width": width} if width else {}
    return element("Image", attr(**pairs), words(alt), [name, ""])


def pandoc(source, *options):
    """What it writes, at work beside the filters and templates."""
    run = subprocess.run(
        [pypandoc.get_pandoc_path(), *options],
        input=source, capture_output=True, text=True, cwd=HERE,
    )  # fmt: skip
    if run.returncode:
        raise ReportError(run.stderr.strip())
    return run.stdout


def tidy_table(table):
    """Right-align columns of numbers; one row of heads; no counting index,
    and none of the attributes by which pandas draws it."""
    _, _, columns, head, bodies, _ = table["c"]
    rows = [row for body in bodies for row in body[3]]
    heads = head[1]
    for row in heads + rows:
        row[0] = attr()
        for cell in row[1]:
            cell[0], cell[1] = attr(), {"t": "AlignDefault"}
    table["c"][0] = head[0] = attr()
    simple = all(len(row[1]) == len(columns) for row in heads + rows)
    if not simple or not rows:
        return [table]
    if len(heads) == 2:  # the index's own name stands in a row of its own
        both = list(zip(*(row[1] for row in heads), strict=True))
        if not any(text_of(up) and text_of(low) for up, low in both):
            del heads[1]
            heads[0][1] = [low if text_of(low) else up for up, low in both]
    grid = [[text_of(cell[4]).strip() for cell in row[1]] for row in rows]
    counts = [row[0] for row in grid] == [str(k) for k in range(len(grid))]
    if heads and len(columns) > 1 and counts and not text_of(heads[0][1][0]):
        for row in [columns, *grid, *(row[1] for row in heads + rows)]:
            del row[0]
    for body in bodies:
        body[1] = 0
    for k, column in enumerate(columns):
        cells = [row[k] for row in grid if row[k]]
        numbers = all(NUMBER.fullmatch(cell) for cell in cells)
        if column[0]["t"] == "AlignDefault":
            side = "AlignRight" if cells and numbers else "AlignLeft"
            column[0] = {"t": side}
    return [table]


def tidy(item):
    """Plain elements: apostrophes typeset, no class but a language's."""
    if item["t"] == "Str":
        item["c"] = re.sub(r"(?<=[^\W\d_])'(?=[^\W\d_])", "’", item["c"])
    elif item["t"] == "CodeBlock":
        known = [c for c in item["c"][0][1] if re.fullmatch(r"[\w+-]+", c)]
        item["c"][0] = attr("", *(known[:1] or ["output"]))
    elif item["t"] == "Table":
        return tidy_table(item)
    elif item["t"] in ("Div", "Span"):
        return item["c"][1]
    return [item]
