"""Bind the executed notebooks into report.pdf and report.html.

python report/build.py                           as they are saved
python report/build.py --execute -p EPOCHS 50    run with other settings
python report/build.py --in-place                run, and keep the results
"""

import argparse
import ast
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
import yaml
from binder import WIDGET, Binder, first_line, label
from tree import ReportError

HERE = Path(__file__).parent


def parameters_of(notebook, path):
    """{name: default} of the cell tagged parameters."""
    found = {}
    for number, cell in enumerate(notebook.cells, 1):
        if "parameters" not in cell.metadata.get("tags", ()):
            continue
        try:
            body = ast.parse(cell.source).body
        except SyntaxError as error:
            raise ReportError(f"{label(path, number)}: {error}") from None
        for line in body:
            if isinstance(line, (ast.Assign, ast.AnnAssign)) and line.value:
                targets = getattr(line, "targets", None) or [line.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        found[target.id] = ast.unparse(line.value)
    return found


def parsed(text):
    """A value as YAML has it, and 1e-3 as the number that it is."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def execute(notebooks, values, work):
    """Run copies in work, with figures there too: -> {path: notebook}."""
    import papermill  # takes seconds, which binding alone need not wait

    for name in ("papermill", "traitlets", "asyncio"):  # this says it better
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    done = {}
    for path, notebook in notebooks.items():
        known = parameters_of(notebook, path)
        chosen = {k: v for k, v in values.items() if k in known}
        target = work / path.name
        try:
            done[path] = papermill.execute_notebook(
                path, target, chosen, cwd=path.parent, kernel_name="python3",
                language="python",
                extra_arguments=["--log-level=CRITICAL"],
                progress_bar={"desc": path.stem, "file": sys.stderr},
            )  # fmt: skip
        except papermill.PapermillExecutionError as error:
            tags = [c.metadata.get("tags", ()) for c in notebook.cells]
            tagged = [k for k, t in enumerate(tags) if "parameters" in t]
            shift = bool(chosen) and error.cell_index > tagged[0]
            raise ReportError(
                f"{label(path, error.cell_index + 1 - shift)} failed: "
                f"{first_line(error.source)}\n{error.ename}: {error.evalue}"
            ) from None
        except (OSError, RuntimeError) as error:  # the kernel itself died
            raise ReportError(
                f"{running(target) or path.name} failed: {error}"
            ) from None
    return done


def running(path):
    """The cell of a saved run at which its kernel died: the last that
    started."""
    found = None
    if path.exists():
        for number, cell in enumerate(nbformat.read(path, 4).cells, 1):
            if cell.metadata.get("papermill", {}).get("start_time"):
                found = f"{label(path, number)} ({first_line(cell.source)})"
    return found


def clean(notebook):
    """A notebook as it is committed: nothing of when and how it ran."""
    kernel = {"display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({
        "kernelspec": kernel | {"name": "python3"},
        "language_info": {"name": "python"},
    })  # fmt: skip
    for cell in notebook.cells:
        for key in ("papermill", "execution", "collapsed", "scrolled"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        kept = []
        for output in cell.get("outputs", ()):
            stream = output.output_type == "stream"
            if stream and output.name == "stderr":
                continue
            if WIDGET in output.get("data", ()):
                continue
            if stream and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            else:
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    return notebook


def replace_all(files):
    """Write {path: bytes} beside, then rename each: readers meet old files
    or new ones, never half of one."""
    ready = {}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            ready[path] = name
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(name, 0o644)
        for path in list(ready):
            os.replace(ready[path], path)
            del ready[path]
    finally:
        for name in ready.values():
            os.unlink(name)


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, root = parser.add_argument, HERE.parent
    # fmt: off
    add("--execute", action="store_true", help="run private copies first")
    add("--in-place", action="store_true",
        help="run, save notebooks and figures, and bind nothing")
    add("-p", nargs=2, action="append", default=[], dest="parameters",
        metavar=("NAME", "VALUE"), help="with --execute; may be repeated")
    add("--no-code", action="store_true", help="leave the code out")
    add("--notebooks", type=Path, default=root / "notebooks", metavar="DIR")
    add("--figures", type=Path, default=root / "figures", metavar="DIR")
    add("--output", type=Path, default=HERE, metavar="DIR")
    # fmt: on
    chosen = parser.parse_args(argv)
    try:
        chosen.values = {name: parsed(v) for name, v in chosen.parameters}
    except yaml.YAMLError as error:
        parser.error(f"-p: {' '.join(str(error).split())}")
    if chosen.parameters and (chosen.in_place or not chosen.execute):
        parser.error("-p needs --execute, and goes without --in-place")
    return chosen


def refuse_unknown(names, notebooks):
    """Before anything runs: exit code 2 at a name that nobody takes."""
    known = {}
    for path, notebook in notebooks.items():
        for name, default in parameters_of(notebook, path).items():
            known.setdefault(name, []).append(f"{path.name}: {default}")
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"error: no parameter {', '.join(unknown)}. Known:",
              file=sys.stderr)  # fmt: skip
        for name, places in sorted(known.items()):
            print(f"  {name}  ({'; '.join(places)})", file=sys.stderr)
        raise SystemExit(2)


def run(options, work):
    paths = sorted(options.notebooks.resolve().glob("0*.ipynb"))
    if not paths:
        raise ReportError(f"no notebooks 0*.ipynb in {options.notebooks}")
    try:
        notebooks = {p: nbformat.read(p, as_version=4) for p in paths}
    except (ValueError, nbformat.ValidationError) as error:
        raise ReportError(f"no notebook: {error}") from None
    refuse_unknown(options.values, notebooks)
    figures = options.figures.resolve()
    if options.execute or options.in_place:
        figures = work / "figures"
        places = {"FIGURES": figures, "IPYTHONDIR": work / "ipython"}
        places = {key: str(place) for key, place in places.items()}
        with mock.patch.dict(os.environ, places):
            notebooks = execute(notebooks, options.values, work)
    if options.in_place:
        for path, notebook in notebooks.items():
            for cell in notebook.cells:
                if "injected-parameters" in cell.metadata.get("tags", ()):
                    raise ReportError(f"{path.name} has injected parameters")
        texts = {p: nbformat.writes(clean(n)) for p, n in notebooks.items()}
        files = {p: f"{text}\n".encode() for p, text in texts.items()}
        if figures.exists():
            for path in sorted(figures.iterdir()):
                files[options.figures / path.name] = path.read_bytes()
        replace_all(files)
        return
    binder = Binder(notebooks, figures, work, not options.no_code)
    tree = binder.document()
    files = {
        options.output / "report.pdf": binder.pdf(tree),
        options.output / "report.html": binder.html(tree),
    }
    replace_all(files)
    for path, data in files.items():
        print(f"{path}  {len(data) / 1e6:.1f} MB")


def main(argv=None):
    options = arguments(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="report-") as work:
            run(options, Path(work).resolve())
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the last report is as it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):  # even if it was ignored
        signal.signal(stop, signal.default_int_handler)
    sys.exit(main())
