"""Bind the executed notebooks into report.pdf and report.html.

python -m report                          as they are saved
python -m report --execute                run private copies first
python -m report --execute -p EPOCHS 50   with another setting, wherever a
                                          notebook has such a parameter
python -m report --execute -p 03.N 3000   in notebook 03 alone
python -m report --in-place               run, and keep the results
"""

import argparse
import ast
import logging
import math
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
from nbconvert.preprocessors import (
    ClearMetadataPreprocessor,
    CoalesceStreamsPreprocessor,
)

from report import HERE, WIDGET, Refused, ReportExporter
from report import ReportHTMLExporter, merge

ROOT = HERE.parent
NAMES = (
    "01_kde", "02_coupling_math", "03_train_flows",
    "04_depth_size_complexity",
)  # fmt: skip
TITLE = "Density estimation in two dimensions"
SUBTITLE = (
    "Kernels and normalizing flows: four notebooks, "
    "every fit scored against the truth"
)


def literal(text):
    """A value as Python has it; what is none, is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def suits(value, default):
    """Whether a value can stand for the default: of its type, and where
    the default is positive, positive too."""
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(
            suits(item, default[0]) for item in value if default
        )  # fmt: skip
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return type(value) is type(default)
    kinds = (int,) if isinstance(default, int) else (int, float)
    return type(value) in kinds and math.isfinite(value) and (
        value > 0 or default <= 0 <= value
    )  # fmt: skip


def chosen(options, paths):
    """{path: {name: value}}, when every name is known and every value can
    be what its notebook takes; else exit code 2, before anything runs."""
    import papermill  # takes a second, which binding alone need not wait

    known = {path: papermill.inspect_notebook(path) for path in paths}
    values, wrong = {path: {} for path in paths}, []
    for aimed, text in options:
        prefix, _, name = aimed.rpartition(".")
        takers = [
            path for path in paths
            if path.stem.startswith(prefix) and name in known[path]
        ]  # fmt: skip
        if not takers:
            wrong.append(f"no parameter {aimed}")
        for path in takers:
            value = literal(text)
            default = known[path][name]["default"]
            if suits(value, literal(default)):
                values[path][name] = value
            else:
                wrong.append(
                    f"{path.stem}: {name} = {text} cannot stand for {default}"
                )
    if wrong:
        print("error:", *wrong, "The parameters are:", sep="\n  ",
              file=sys.stderr)  # fmt: skip
        for path, names in known.items():
            for name, about in names.items():
                print(f"    {path.stem[:2]}.{name} = {about['default']}",
                      file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    return values


def execute(path, values, work):
    """A notebook as it is after a run of a copy in work."""
    import papermill

    for name in ("papermill", "traitlets", "asyncio"):  # this says it better
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        return papermill.execute_notebook(
            path, work / path.name, values, cwd=path.parent,
            kernel_name="python3", language="python",
            progress_bar={"desc": path.stem, "file": sys.stderr},
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        line = error.source.strip().split("\n")[0]
        raise Refused(
            f"{path.name}, cell {error.cell_index + 1 - bool(values)} "
            f"failed: {line}\n{error.ename}: {error.evalue}"
        ) from None
    except RuntimeError as error:  # the kernel itself died
        raise Refused(f"{path.name} failed: {error}") from None


def clean(notebook):
    """A notebook as it is committed: nothing of when and how it ran."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    notebook, _ = ClearMetadataPreprocessor(
        preserve_cell_metadata_mask={"tags"}
    ).preprocess(notebook, {})
    kernel = {"display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel | {"name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs
                if output.get("name") != "stderr"
                and WIDGET not in output.get("data", ())
            ]  # fmt: skip
    return notebook


def replace_all(files):
    """Write {path: bytes} beside, then rename all of them."""
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{path.name}.new").write_bytes(data)
    for path in files:
        os.replace(path.with_name(f"{path.name}.new"), path)


def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    # fmt: off
    add("--execute", action="store_true", help="run private copies first")
    add("--in-place", action="store_true",
        help="run, save notebooks and figures, and bind nothing")
    add("-p", nargs=2, action="append", default=[], dest="parameters",
        metavar=("NAME", "VALUE"), help="with --execute; may be repeated")
    add("--code", default="teach", choices=["teach", "all", "none"],
        help="which code to show: what teaches, all of it, or none")
    add("--notebooks", type=Path, default=ROOT / "notebooks", metavar="DIR")
    add("--output", type=Path, default=HERE, metavar="DIR")
    # fmt: on
    options = parser.parse_args(argv)
    if options.parameters and (options.in_place or not options.execute):
        parser.error("-p needs --execute, and goes without --in-place")
    return options


def find(folder):
    """The paths of the notebooks that are bound, in their order."""
    paths = [folder.resolve() / f"{name}.ipynb" for name in NAMES]
    for path in sorted(folder.glob("*.ipynb")):
        if path.stem not in NAMES:
            print(f"{path.name} is left out", file=sys.stderr)
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise Refused(f"no notebook {', '.join(missing)} in {folder}")
    return paths


def bind(notebooks, figures, options):
    """{path: bytes} of the report."""
    report = merge(notebooks, title=TITLE, subtitle=SUBTITLE, pagetitle=TITLE)
    about = {"metadata": {"path": str(options.notebooks)}}
    files = {}
    for exporter in (ReportExporter, ReportHTMLExporter):
        made = exporter(code=options.code, figures=str(figures))
        data, _ = made.from_notebook_node(report, about)
        data = data if isinstance(data, bytes) else data.encode()
        files[options.output / f"report{made.file_extension}"] = data
    return files


def run(options, work):
    paths = find(options.notebooks)
    figures = options.notebooks.resolve().parent / "figures"
    if options.execute or options.in_place:
        values = chosen(options.parameters, paths)
        places = {"FIGURES": str(work / "figures")}
        if options.in_place:
            places["RUNS"] = ""  # nothing is remembered: it is run
        with mock.patch.dict(os.environ, places):
            notebooks = {
                path: execute(path, values[path], work) for path in paths
            }
    else:
        notebooks = {path: nbformat.read(path, 4) for path in paths}
    if options.in_place:
        texts = {path: nbformat.writes(clean(n)) for path, n in
                 notebooks.items()}  # fmt: skip
        files = {path: f"{text}\n".encode() for path, text in texts.items()}
        for path in (work / "figures").glob("*"):
            files[figures / path.name] = path.read_bytes()
        return files
    if options.execute:
        figures = work / "figures"
    notebooks = {path.name: notebook for path, notebook in notebooks.items()}
    return bind(notebooks, figures, options)


def main(argv=None):
    options = arguments(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="report-") as work:
            files = run(options, Path(work).resolve())
        replace_all(files)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the last report is as it was", file=sys.stderr)
        return 130
    for path, data in files.items():
        if re.fullmatch(r"report\.\w+", path.name):
            print(f"{path}  {len(data) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
