"""The four notebooks as they are committed, and the report made of them."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from pypdf import PdfReader

PATHS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
HEADINGS = [
    *(f"Task {n}" for n in (1, 2, 3, 4)),  # Part I
    *(f"Task {n}" for n in range(1, 13)),  # Part II
]
# Small enough for a test, odd enough to trip over: an odd number of points,
# three layers, one seed.
OTHER = {
    "N": 401, "K": 3, "EPOCHS": 3, "SEEDS": 1, "FEW": 1, "POINTS": 500,
    "DRAWS": 4, "HELD_OUT": 200, "NUM_GAUSSIANS": 4, "FRAMES": 1,
    "BANDWIDTHS": "[0.2, 0.7]",
}  # fmt: skip


def build(*options, offline=False):
    command = [sys.executable, str(ROOT / "report/build.py"), *options]
    if offline:  # a network of its own, with nothing but itself on it
        alone = 'ip link set lo up && exec "$@"'
        command = ["unshare", "-rn", "sh", "-c", alone, "sh", *command]
    return subprocess.run(command, capture_output=True, text=True)


def can_cut_the_network():
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    probe = ["unshare", "-rn", "ip", "link", "set", "lo", "up"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def text_of(pdf):
    pages = [page.extract_text() for page in PdfReader(pdf).pages]
    return "\n".join(pages)


def check_pdf(path):
    text = text_of(path)
    outline = json.dumps(str(PdfReader(path).outline))
    for heading in set(HEADINGS):
        wanted = HEADINGS.count(heading)
        assert len(re.findall(rf"{heading}[: (]", outline)) >= wanted, heading
    # The code in the report has no TeX commands of its own.
    for tex in (r"\frac", r"\mathbb", r"\begin{", r"\tag", r"\sigma", "$$"):
        assert tex not in text, tex
    assert "Traceback" not in text


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_notebook_is_committed_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    counts = [c.execution_count for c in cells]
    assert counts == list(range(1, len(cells) + 1))
    for cell in cells:
        assert len(cell.source.splitlines()) <= 25
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert not any("widget" in m for m in output.get("data", ()))
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < 3e6
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", ())]
    assert len(tagged) == 1


def test_report_of_the_committed_notebooks(tmp_path):
    done = build("--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    check_pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size < 5e6


@pytest.mark.slow
def test_report_with_other_parameters_and_no_network(tmp_path):
    """Every notebook runs to its end at other settings, and fetches
    nothing."""
    options = [o for k, v in OTHER.items() for o in ("-p", k, str(v))]
    offline = can_cut_the_network()
    done = build(
        "--execute", "--output", str(tmp_path), *options, offline=offline
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_pdf(tmp_path / "report.pdf")
    if not offline:
        pytest.skip("ran, but unshare and ip are needed to cut the network")


@pytest.mark.parametrize("name, value", [("K", 0), ("SEEDS", -1), ("N", 1.5)])
def test_parameters_that_cannot_work_are_refused_at_once(
    name, value, tmp_path
):
    only = tmp_path / "notebooks"
    only.mkdir()
    insert = 'sys.path.insert(0, \\"{}\\")'
    source = PATHS[2].read_text()
    source = source.replace(insert.format(".."), insert.format(ROOT))
    (only / PATHS[2].name).write_text(source)
    done = build(
        *("--execute", "-p", name, str(value)),
        *("--notebooks", str(only), "--output", str(tmp_path)),
    )
    assert done.returncode == 1
    assert re.search(rf"{name} must be .*got {value}", done.stderr)
    assert "cell 5 failed" in done.stderr or "cell 4 failed" in done.stderr


def rows_between(marker):
    """The numbers of each row of a README table between its comments."""
    text = (ROOT / "README.md").read_text()
    table = text.split(f"<!-- {marker} -->")[1].split("<!--")[0]
    rows = [row.split("|")[1:-1] for row in table.splitlines() if "|" in row]
    assert len(rows) >= 6
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_readme_shows_what_the_notebook_printed():
    notebook = nbformat.read(PATHS[3], as_version=4)
    printed = [
        output.data["text/plain"].splitlines()
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "KDE, sharpened" in output.get("data", {}).get("text/plain", "")
    ]
    values = [line.split()[-5:] for line in printed[0][1:]]
    columns = 0, 2, 3, 4  # without the KDE of the best h
    shown = [row[1:] for row in rows_between("results")]
    assert shown == [[row[k] for k in columns] for row in values]


def test_readme_shows_what_the_benchmark_printed():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    for row in rows_between("bench"):
        for cell in row[1:]:
            assert cell in results, row
