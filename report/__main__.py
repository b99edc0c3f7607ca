"""Bind the executed notebooks into report.pdf and report.html.

python -m report                as they are saved
python -m report --execute      run private copies first
python -m report -p EPOCHS 50   with another value, wherever a notebook has
python -m report -p 03.N 3000   such a parameter; in notebook 03 alone

All four run each time. --notebooks names the folder that has them, --output
the one to write to.
"""

import argparse
import ast
import copy
import os
import re
import sys
import tempfile
from pathlib import Path

import joblib
import nbformat
import papermill
from nbformat.v4 import new_markdown_cell, new_notebook
from traitlets.config import Config

from report import (
    HERE,
    Refused,
    ReportExporter,
    ReportHTMLExporter,
    brief,
    check,
)

NAMES = ["01_kde.ipynb", "02_coupling_math.ipynb", "03_train_flows.ipynb",
         "04_depth_size_complexity.ipynb"]  # fmt: skip
TITLE = "Density estimation: kernels and normalizing flows"


def literal(text):
    """A value as Python has it; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def suits(value, default):
    """Whether a value is of the default's type, and positive if that is."""
    if isinstance(default, (list, tuple)):
        right = isinstance(value, (list, tuple)) and len(value) > 0
        items = value if default else ()  # of no item, any will do
        return right and all(suits(item, default[0]) for item in items)
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return type(value) is type(default)
    number = type(value) in (int, type(default))
    return number and (value > 0 or default <= 0)


def kind(default):
    """What suits a number or a list of them, for a message."""
    if isinstance(default, (list, tuple)) and default:
        return kind(default[0]).replace("(", "(a list, each a ")
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return ""
    sign = "positive " if default > 0 else ""
    return f" ({sign}{'integer' if type(default) is int else 'number'})"


def read(path):
    """A notebook, or what is wrong with its file."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except OSError:
        raise
    except Exception as error:  # cut off, not UTF-8, no notebook: many names
        what = f"is not a whole notebook: {brief(error)}"
        raise Refused(f"{path.name} {what}") from None
    check(notebook, path.name)
    return notebook


def choose(options, paths):
    """{path: {name: value}}, where every notebook can take what it gets."""
    known = {path: papermill.inspect_notebook(path) for path in paths}
    values = {path: {} for path in paths}
    for aim, text in options:
        prefix, _, name = aim.rpartition(".")
        takers = [path for path in paths if path.name.startswith(prefix)]
        takers = [path for path in takers if name in known[path]]
        if not takers:
            names = sorted(set().union(*known.values()))
            raise Refused(f"no parameter {aim}; there are {', '.join(names)}")
        for path in takers:
            values[path][name] = literal(text)
            default = known[path][name]["default"]
            if not suits(literal(text), literal(default)):
                raise Refused(
                    f"{path.name}: {name} must be like {default}"
                    f"{kind(literal(default))}, got {text}"
                )
    return values


@joblib.delayed  # in a process, which on an interrupt ends its kernel
def execute(path, values, work):
    """Its path, and a notebook as a run of a copy in work leaves it."""
    os.environ["FIGURES"] = str(work / "figures")  # the kernel's too
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two share the cores
    # Two processes may choose the same free port; files are each one's own.
    own = {"transport": "ipc", "ip": str(work / path.name[:2])}
    config = Config(KernelManager=own if os.name == "posix" else {})
    try:
        return path, papermill.execute_notebook(
            path, work / path.name, values[path], kernel_name="python3",
            language="python", cwd=path.parent, config=config, progress_bar={
                "desc": path.name, "position": NAMES.index(path.name)},
        )  # fmt: skip
    except (papermill.PapermillExecutionError, RuntimeError) as error:
        raise Refused(f"{path.name} failed: {error}") from None


def merge(notebooks):
    """{file name: notebook} as one, behind a summary of all and without the
    cells for Jupyter alone; and, for the exporters, what is to be said of
    it."""
    summary, cells, changed, places = [], [], [], {}

    def add(to, cell, *place):
        cell = copy.deepcopy(cell)
        cell.id = f"cell-{len(places)}"
        places[cell.id] = place
        to.append(cell)

    for name, notebook in notebooks.items():
        found = []
        for number, cell in enumerate(notebook.cells, 1):
            tags = cell.metadata.get("tags", ())
            if "jupyter-only" not in tags:
                add(cells, cell, name, number, None)
            if "summary" in tags:  # its first section, without a heading
                add(found, cell, name, number, "summary")
                parts = re.split(r"(?m)^#+ .*$", cell.source)
                found[-1].source = next(filter(str.strip, parts), "")
            if "injected-parameters" in tags:
                lines = ", ".join(re.findall("(?m)^[A-Z].*", cell.source))
                changed.append([name, lines])
        if found:
            text = "" if summary else "# Summary\n\n"
            head = new_markdown_cell(f"{text}### []({name})")
            add(summary, head, "summary", 0, None)
            summary += found
    about = {"title": TITLE, "pagetitle": TITLE, "changed": changed}
    return new_notebook(cells=summary + cells), about | {"places": places}


def bind(options, work):
    """{file name: bytes} of the report."""
    folder = options.notebooks.resolve()
    paths = [folder / name for name in NAMES]
    for path in sorted({*folder.glob("*.ipynb")} - {*paths}):
        print(f"left out: {path.name}", file=sys.stderr)
    done = {path: read(path) for path in paths}
    about = {"metadata": {"path": str(folder)}}
    run = options.execute or options.p
    if run:
        values = choose(options.p, paths)
        longest_first = paths[:1:-1] + paths[:2]
        jobs = (execute(path, values, work) for path in longest_first)
        done |= dict(joblib.Parallel(2)(jobs))
    report, about["report"] = merge({path.name: done[path] for path in paths})
    if run:
        about["report"]["figures"] = work / "figures"

    @joblib.delayed
    def export(kind):
        exporter = kind(code=options.code)
        data, _ = exporter.from_notebook_node(report, about)
        data = data if isinstance(data, bytes) else data.encode()
        return f"report{exporter.file_extension}", data

    jobs = map(export, (ReportExporter, ReportHTMLExporter))
    return dict(joblib.Parallel(2, prefer="threads")(jobs))


def main(argv=None):
    parser = argparse.ArgumentParser("python -m report", None, __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--execute", action="store_true")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    add("--code", default="teach", choices=["teach", "all", "none"])
    add("--notebooks", type=Path, default=HERE.parent / "notebooks")
    add("--output", type=Path, default=HERE)
    options = parser.parse_args(argv)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(  # of its own: two may run at once
            prefix="report.", dir=options.output, ignore_cleanup_errors=True
        ) as work:
            made = bind(options, Path(work).resolve())
            for name, data in made.items():
                Path(work, name).write_bytes(data)
            for name, data in made.items():
                path = Path(work, name).replace(options.output / name)
                print(f"{path}  {len(data) / 1e6:.1f} MB")
    except (Refused, OSError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'stopped'}; the last report stays")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # any path is printed
    main()
