"""Bind the executed notebooks into report.pdf and report.html.

python -m report                          as they are saved
python -m report --execute                run private copies first
python -m report --execute -p EPOCHS 50   with another value, wherever a
                                          notebook has such a parameter
python -m report --execute -p 03.N 3000   in notebook 03 alone
"""

import argparse
import ast
import copy
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
import papermill
from nbformat.v4 import new_markdown_cell, new_notebook

from report import (
    HERE,
    Refused,
    ReportExporter,
    ReportHTMLExporter,
    first_line,
)

NAMES = [
    "01_kde.ipynb", "02_coupling_math.ipynb", "03_train_flows.ipynb",
    "04_depth_size_complexity.ipynb",
]  # fmt: skip
TITLE = "Density estimation in two dimensions"
SUBTITLE = (
    "Kernels and normalizing flows: four notebooks, "
    "every fit scored against the truth"
)


def literal(text):
    """A value as Python has it; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def suits(value, default):
    """Whether a value is of the default's type; positive, if that is."""
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and bool(value) and all(
            suits(item, default[0]) for item in value
        )  # fmt: skip
    numbers = (int, float) if type(default) is float else (type(default),)
    if type(value) not in numbers:
        return False
    return type(default) not in (int, float) or value > 0 or default <= 0


def choose(options, paths):
    """{path: {name: value}}. Exit code 2, before anything runs, where a
    name is unknown, or a value none that its notebook can take."""
    known = {path: papermill.inspect_notebook(path) for path in paths}
    values, wrong = {path: {} for path in paths}, []
    for aim, text in options:
        prefix, _, name = aim.rpartition(".")
        takers = [path for path in paths if path.name.startswith(prefix)]
        takers = [path for path in takers if name in known[path]]
        if not takers:
            wrong.append(f"no parameter {aim}")
        for path in takers:
            values[path][name] = literal(text)
            default = known[path][name]["default"]
            if not suits(literal(text), literal(default)):
                wrong.append(f"{path.name}: {name} = {default}, not {text}")
    if wrong:
        names = [f"{p.name[:2]}.{n}" for p, names in known.items()
                 for n in names]  # fmt: skip
        message = ["error:", *wrong, f"There are: {', '.join(names)}"]
        print("\n  ".join(message), file=sys.stderr)
        raise SystemExit(2)
    return values


def execute(path, values, work):
    """A notebook as a run of a copy in work leaves it."""
    try:
        return papermill.execute_notebook(
            path, work / path.name, values, cwd=path.parent,
            kernel_name="python3", language="python", log_output=False,
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        cell = f"{path.name}, cell {error.cell_index + 1 - bool(values)}"
        raise Refused(
            f"{cell} failed: {first_line(error)}\n"
            f"{error.ename}: {error.evalue}"
        ) from None
    except RuntimeError as error:  # the kernel itself died
        raise Refused(f"{path.name} failed: {error}") from None


def summary_of(name, cells):
    """What the cells tagged summary say, under the notebook's title."""
    title = re.search(r"(?m)^# (.*)", "\n".join(c.source for c in cells))
    found = []
    for cell in copy.deepcopy(cells):
        if "summary" not in cell.metadata.get("tags", ()):
            continue
        cell.metadata["summary"] = True
        if cell.cell_type == "markdown":  # its section, without the heading
            parts = re.split(r"(?m)^#+ .*\n?", cell.source.strip())
            cell.source = parts[cell.source.strip().startswith("#")]
        found.append(cell)
    if found and title:
        found.insert(0, new_markdown_cell(f"### [{title[1]}]({name})"))
    return found


def merge(notebooks):
    """{file name: notebook} as one, behind a summary."""
    summary, cells, changed = [], [], []
    for name, notebook in notebooks.items():
        for number, cell in enumerate(notebook.cells, 1):
            cell.metadata["place"] = [name, number]
            if "injected-parameters" in cell.metadata.get("tags", ()):
                lines = re.findall(r"(?m)^\w+ = .*", cell.source)
                changed.append(f"{name[:2]}: `{', '.join(lines)}`")
        summary += summary_of(name, notebook.cells)
        cells += notebook.cells
    if summary:
        summary.insert(0, new_markdown_cell("# Summary"))
    summary.append(new_markdown_cell("", metadata={"kind": "contents"}))
    for number, cell in enumerate(summary + cells):
        cell.id = f"cell-{number}"
    about = {"title": TITLE, "subtitle": SUBTITLE, "pagetitle": TITLE}
    about["parameters"] = changed
    return new_notebook(cells=summary + cells, metadata={"report": about})


def run(options, work):
    """{path: bytes} of the report."""
    folder, figures = options.notebooks, options.notebooks.parent / "figures"
    paths = [folder / name for name in NAMES]
    for path in sorted({*folder.glob("*.ipynb")} - {*paths}):
        print(f"left out: {path.name}", file=sys.stderr)
    if options.execute:
        figures = work / "figures"
        values = choose(options.parameters, paths)
        with mock.patch.dict(os.environ, {"FIGURES": str(figures)}):
            done = [execute(path, values[path], work) for path in paths]
    else:
        done = [nbformat.read(path, as_version=4) for path in paths]
    report, files = merge(dict(zip(NAMES, done, strict=True))), {}
    for kind in ReportExporter, ReportHTMLExporter:
        exporter = kind(code=options.code, figures=str(figures))
        data, _ = exporter.from_notebook_node(
            report, {"metadata": {"path": str(folder)}}
        )
        data = data if isinstance(data, bytes) else data.encode()
        files[options.output / f"report{exporter.file_extension}"] = data
    return files


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--execute", action="store_true")
    add("-p", nargs=2, action="append", default=[], dest="parameters",
        metavar=("NAME", "VALUE"))  # fmt: skip
    add("--code", default="teach", choices=["teach", "all", "none"])
    add("--notebooks", type=Path, default=HERE.parent / "notebooks")
    add("--output", type=Path, default=HERE)
    options = parser.parse_args(argv)
    options.notebooks = options.notebooks.resolve()
    if options.parameters and not options.execute:
        parser.error("-p needs --execute")
    try:
        with tempfile.TemporaryDirectory(prefix="report-") as work:
            files = run(options, Path(work))
    except (Refused, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the last report is as it was")
    for path, data in files.items():
        path.with_suffix(".new").write_bytes(data)
        path.with_suffix(".new").replace(path)
        print(f"{path}  {len(data) / 1e6:.1f} MB")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
