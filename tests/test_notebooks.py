"""The four notebooks as they are committed, and at other parameters."""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from pypdf import PdfReader

PATHS = sorted((ROOT / "notebooks").glob("0?_*[a-z].ipynb"))
HEADINGS = [
    *(f"Task {n}" for n in (1, 2, 3, 4)),  # Part I
    *(f"Task {n}" for n in range(1, 13)),  # Part II
]
# Small enough for a test, odd enough to trip over.
OTHER = {
    "N": 401, "K": 3, "EPOCHS": 3, "SEEDS": 1, "POINTS": 500,
    "DRAWS": 4, "HELD_OUT": 200, "NUM_GAUSSIANS": 4, "FRAMES": 1,
    "BANDWIDTHS": "[0.2, 0.7]",
}  # fmt: skip


def alone(*command):
    """A command in a network of its own, with nothing but itself on it."""
    cut = 'ip link set lo up && exec "$@"'
    return ["unshare", "-rn", "sh", "-c", cut, "sh", *command]


def can_cut_the_network():
    tools = shutil.which("unshare") and shutil.which("ip")
    return tools and not subprocess.run(alone("true")).returncode


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_notebook_is_committed_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    counts = [c.execution_count for c in cells]
    assert counts == list(range(1, len(cells) + 1))
    first = [o for c in notebook.cells[:3] for o in c.get("outputs", ())]
    assert not cells or any("image/png" in o.get("data", ()) for o in first)
    for cell in cells:
        assert len(cell.source.splitlines()) <= 20
        folded = cell.metadata.get("jupyter") == {"source_hidden": True}
        assert folded == ("hide-input" in cell.metadata.get("tags", ()))
        assert max(map(len, cell.source.splitlines())) <= 79
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert "False" not in output.get("text", "")
            assert not any("widget" in m for m in output.get("data", ()))
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < 5e6
    tags = [tag for c in cells for tag in c.metadata.get("tags", ())]
    assert tags.count("parameters") == bool(cells)


@pytest.mark.slow
def test_report_with_other_parameters_and_no_network(tmp_path):
    """Every notebook runs to its end at other settings, and fetches
    nothing."""
    known = "".join(path.read_text("utf-8") for path in PATHS)
    options = [o for k, v in OTHER.items() if f'"{k} = ' in known
               for o in ("-p", k, str(v))]  # fmt: skip
    command = [sys.executable, "-m", "report", "--execute",
               "--output", str(tmp_path), *options]  # fmt: skip
    offline = can_cut_the_network()
    command = alone(*command) if offline else command
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    pdf = PdfReader(tmp_path / "report.pdf")
    outline = json.dumps(str(pdf.outline))
    for heading in set(HEADINGS):
        wanted = HEADINGS.count(heading)
        assert len(re.findall(rf"{heading}[: (]", outline)) >= wanted, heading
    text = "\n".join(page.extract_text() for page in pdf.pages)
    for tex in (r"\frac", r"\mathbb", r"\begin{", r"\tag", "$$", "Traceback"):
        assert tex not in text, tex
    if not offline:
        pytest.skip("ran, but unshare and ip are needed to cut the network")


def rows_between(marker):
    """The cells of each row of a README table between its comments."""
    text = (ROOT / "README.md").read_text("utf-8")
    table = text.split(f"<!-- {marker} -->")[1].split("<!--")[0]
    rows = [row.split("|")[1:-1] for row in table.splitlines() if "|" in row]
    assert len(rows) >= 5
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_readme_shows_what_the_notebook_printed():
    notebook = nbformat.read(PATHS[3], as_version=4)
    (printed,) = [
        output.data["text/markdown"].splitlines()
        for cell in notebook.cells
        if "summary" in cell.metadata.get("tags", ())
        for output in cell.get("outputs", ())
        if "local width" in output.get("data", {}).get("text/markdown", "")
    ]
    rows = [row.split("|")[1:-1] for row in printed[2:]]
    assert rows_between("results") == [[c.strip() for c in r] for r in rows]


def test_readme_on_your_own_data_runs_as_it_is_pasted(tmp_path):
    text = (ROOT / "README.md").read_text("utf-8").split("own data -->")[1]
    code = text.split("```python\n")[1].split("```")[0]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(values) == 3
    assert all(abs(value + 9.8) < 0.1 for value in values)  # nats
    assert (tmp_path / "people.png").stat().st_size > 5000


@pytest.mark.slow
def test_readme_on_a_cluster_runs_as_it_is_pasted(tmp_path):
    text = (ROOT / "README.md").read_text("utf-8").split("cluster -->")[1]
    code = text.split("```python\n")[1].split("```")[0]
    script = tmp_path / "script.py"  # not in the folder of the modules
    script.write_text(code.replace('"epochs": 50', '"epochs": 2'), "utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RUNS": ""}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ok") == 4, done.stdout


def test_readme_shows_what_the_benchmark_printed():
    """Each ratio and error in the row of the flow or library it is of."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text("utf-8")
    for name, *cells in rows_between("bench"):
        library, _, flow = re.sub("'s|`|, h.*", "", name).partition(" ÷ ")
        course = name.startswith("the ")
        whose = flow or "8 members" if course else library
        rows = [row for row in results.splitlines() if whose in row]
        here = cells[:1] if course else cells[:2]
        assert any(all(cell in row for cell in here) for row in rows), name
        assert all(cell in results for cell in cells), name
    for row in rows_between("tables"):
        assert f"| {' | '.join(row)} |" in results
