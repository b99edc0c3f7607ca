"""Bind the executed notebooks into report.pdf and report.html.

python -m report                as they are saved
python -m report --execute      run private copies first
python -m report -p EPOCHS 50   with another value, wherever a notebook has
python -m report -p 03.N 3000   such a parameter; in notebook 03 alone
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

from report import HERE, Refused, ReportExporter, ReportHTMLExporter

NAMES = ["01_kde.ipynb", "02_coupling_math.ipynb", "03_train_flows.ipynb",
         "04_depth_size_complexity.ipynb"]  # fmt: skip
TITLE = "Density estimation: kernels and normalizing flows"


def literal(text):
    """A value as Python has it; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def suits(value, default):
    """Whether a value is of the default's type, and positive if that is."""
    if isinstance(default, (list, tuple)):
        right = isinstance(value, (list, tuple)) and len(value) > 0
        return right and all(suits(item, default[0]) for item in value)
    if isinstance(default, (bool, str)):
        return type(value) is type(default)
    number = type(value) in (int, type(default))
    return number and (value > 0 or default <= 0)


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
                raise Refused(f"{path.name}: {name} = {default}, not {text}")
    return values


@joblib.delayed  # in a process, which on an interrupt ends its kernel
def execute(path, values, work):
    """Its path, and a notebook as a run of a copy in work leaves it."""
    try:
        return path, papermill.execute_notebook(
            path, work / path.name, values[path], kernel_name="python3",
            language="python", cwd=path.parent, progress_bar={
                "desc": path.name, "position": NAMES.index(path.name)},
        )  # fmt: skip
    except (papermill.PapermillExecutionError, RuntimeError) as error:
        raise Refused(f"{path.name} failed: {error}") from None


def merge(notebooks):
    """{file name: notebook} as one, behind a summary of all."""
    summary, cells, changed = [], [], []
    for name, notebook in notebooks.items():
        title = re.search("^# (.*)", notebook.cells[0].source)
        found = []
        for number, cell in enumerate(notebook.cells, 1):
            cell.metadata["place"] = [name, number]
            tags = cell.metadata.get("tags", ())
            if "summary" in tags:  # its first section, without a heading
                parts = re.split(r"(?m)^#+ .*$", cell.source)
                found.append(copy.deepcopy(cell))
                found[-1].source = next(filter(str.strip, parts), "")
                found[-1].metadata["summary"] = True
            if "injected-parameters" in tags:
                lines = ", ".join(re.findall("(?m)^[A-Z].*", cell.source))
                changed.append(f"Other parameters in {name}: `{lines}`\n")
        if found:
            text = "" if summary else "# Summary\n\n"
            text += f"### [{title[1]}]({name})"
            summary += [new_markdown_cell(text), *found]
        cells += notebook.cells
    contents = new_markdown_cell("", metadata={"kind": "contents"})
    cells = [*summary, contents, *cells]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    about = {"title": TITLE, "pagetitle": TITLE, "include-before": changed}
    return new_notebook(cells=cells, metadata={"report": about})


def bind(options, work):
    """{path: bytes} of the report."""
    folder = options.notebooks.resolve()
    paths = [folder / name for name in NAMES]
    for path in sorted({*folder.glob("*.ipynb")} - {*paths}):
        print(f"left out: {path.name}", file=sys.stderr)
    if options.execute or options.p:
        os.environ["FIGURES"] = str(work / "figures")  # the kernels' too
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # two share the cores
        values = choose(options.p, paths)
        jobs = (execute(paths[k], values, work) for k in (3, 0, 2, 1))
        done = dict(joblib.Parallel(2)(jobs))  # the longest first
    else:
        done = {path: nbformat.read(path, as_version=4) for path in paths}
    report = merge({path.name: done[path] for path in paths})
    about = {"metadata": {"path": str(folder)}}

    @joblib.delayed
    def export(kind):
        exporter = kind(code=options.code)
        data, _ = exporter.from_notebook_node(report, about)
        data = data if isinstance(data, bytes) else data.encode()
        return options.output / f"report{exporter.file_extension}", data

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
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
            for path, data in bind(options, Path(work)).items():
                path.with_suffix(".new").write_bytes(data)
                path.with_suffix(".new").replace(path)
                print(f"{path}  {len(data) / 1e6:.1f} MB")
    except (Refused, OSError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'stopped'}; the last report stays")


if __name__ == "__main__":
    main()
