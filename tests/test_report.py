"""The report's promises, each on small notebooks of its own."""

import base64
import html
import io
import itertools
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from nbformat import v4
from PIL import Image
from pypdf import PdfReader

import plots
from report import Refused, ReportExporter, ReportHTMLExporter
from report.__main__ import NAMES, main

JUPYTER = shutil.which("jupyter", path=f"{sys.prefix}/bin")
CONFIG = f"--config={ROOT / 'jupyter_config.py'}"
HOSTILE = r"""#import "x" #panic("y") $(rm -rf z) */ ]] }} `#eval(1)`{=typst}
<script>document.title = 'taken'</script> \input{/etc/passwd} \newcommand"""


def text(source, **metadata):
    return v4.new_markdown_cell(source, metadata=metadata)


def code(source, *outputs, count=1, **metadata):
    return v4.new_code_cell(source, outputs=[*outputs], execution_count=count,
                            metadata=metadata)  # fmt: skip


def shown(metadata=None, **data):
    data = {key.replace("_", "/"): value for key, value in data.items()}
    return v4.new_output("display_data", data=data, metadata=metadata or {})


def png(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (90, 40), color).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def figure(name="a_figure", **more):
    about = {"figure": name, "caption": "A caption with $x^2$."} | more
    return shown(about, image_png=png(), text_plain="<Image>")


def words(made):
    """A string a page, of HTML one, without the blanks."""
    if isinstance(made, str):
        bare = re.sub(r"(?s)<(style|script)>.*?</\1>|<[^>]*>", "", made)
        return [re.sub(r"\s", "", html.unescape(bare))]
    pages = PdfReader(io.BytesIO(made)).pages
    return [re.sub(r"\s", "", page.extract_text()) for page in pages]


def export(cells, exporter=ReportExporter, metadata=None, name="07_other",
           path="/nowhere/notebooks", **options):  # fmt: skip
    about = {"metadata": {"name": name, "path": str(path)}}
    notebook = v4.new_notebook(cells=cells, metadata=metadata or {})
    return exporter(**options).from_notebook_node(notebook, about)[0]


class Desk:
    """The four notebooks, and what binding them gives."""

    def __init__(self, path, capsys):
        self.path, self.capsys = path, capsys
        for k, name in enumerate(NAMES, 1):
            self.put(name, text(f"# {k} Title\n\n## Part $x_{k}$"))

    def put(self, name, *cells):
        kernel = {"name": "python3", "display_name": "", "language": "python"}
        about = {"kernelspec": kernel}
        notebook = v4.new_notebook(cells=[*cells], metadata=about)
        nbformat.write(notebook, self.path / name)

    def bind(self, *options):
        """-> what it said when it gave up, or on stderr."""
        places = "--output", str(self.path), "--notebooks", str(self.path)
        try:
            main([*places, *options])
        except SystemExit as error:
            return str(error)
        return self.capsys.readouterr().err

    def read(self, name):
        return (self.path / name).read_bytes()


@pytest.fixture
def desk(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FIGURES", str(tmp_path / "figures"))
    return Desk(tmp_path, capsys)


def test_the_report_is_bound_from_four_notebooks(desk):
    desk.put(
        NAMES[2], text("# 3 Flows\n\n[up](02_coupling_math.ipynb#Part-$x_2$)"),
        text("## Task 9: $h$\n\n[It](#03_overview) says; [[7]](#References)"),
        code("draw()", figure("03_overview")),
        text("$$ a \\odot \\big|b\\big| \\tag{3.1} $$"),
        text("## Results\n\n| nats |\n|--:|\n| 0.25 |\n\n## Rest\n\nnot in it",
             tags=["summary"]),
        text("Told once", tags=["summary", "jupyter-only"]),
        text("## Try this\n\nAnother seed", tags=["jupyter-only"]),
        text("## References\n\n7. Somebody, *Somewhere*, 1999."),
    )  # fmt: skip
    desk.put("02_coupling_math-Copy1.ipynb", text("# copied"))
    assert desk.bind() == "left out: 02_coupling_math-Copy1.ipynb\n"
    pdf, page = desk.read("report.pdf"), desk.read("report.html").decode()
    title, *chapters = words(pdf)
    summary, _, chapter = "".join(chapters).partition("2Title")
    assert title.startswith("Densityestimation")
    contents = title.split("Contents", 1)[1]
    assert "3Flows" in summary and "0.25" in summary
    assert "notinit" not in summary and "notinit" in chapter
    assert "Toldonce" in summary and "Toldonce" not in chapter
    assert "Anotherseed" not in summary + chapter
    assert re.search(r"Task9:\S\.+\d", contents)
    assert "It(Figure3.1)says" in chapter
    assert "Figure3.1.Acaption" in "".join(chapters)  # it floats
    assert "(3.1)" in chapter and "(3.1)" in words(page)[0]
    outline = str(PdfReader(io.BytesIO(pdf)).outline)
    assert "1 Title" in outline and "Task 9" in outline
    links = re.findall(r'<a\s+href="#([^"]*)"', page)
    assert len(links) > 10 and all(f'id="{link}"' in page for link in links)
    assert page.count('href="#part-x_2-') == 2  # in the contents, and the link
    desk.bind()
    assert desk.read("report.pdf") == pdf
    desk.put(NAMES[3], text("# 4\n\n[there](01_kde.ipynb#Nowhere)"))
    assert f"{NAMES[3]}, cell 1: a link that leads to no" in desk.bind()
    assert desk.read("report.pdf") == pdf


@pytest.mark.parametrize("option, message", [
    ("EPOCH 3", "no parameter EPOCH; there are BANDWIDTHS, EPOCHS, N"),
    ("EPOCHS 0", f"{NAMES[2]}: EPOCHS must be like 250 (positive integer)"),
    ("03.EPOCHS two", "EPOCHS must be like 250 (positive integer), got two"),
    ("01.EPOCHS 3", "no parameter 01.EPOCHS"),
    ("BANDWIDTHS ['x']", "like [0.1, 0.5] (a list, each a positive number)"),
])  # fmt: skip
def test_parameters_are_refused_before_anything_runs(desk, option, message):
    ran = f"open({str(desk.path / 'ran')!r}, 'w')\n"
    for name, source in [(NAMES[0], "N = 10_000\nBANDWIDTHS = [0.1, 0.5]"),
                         (NAMES[2], "N = 1500\nEPOCHS = 250")]:  # fmt: skip
        cell = code(source, count=None, tags=["parameters"])
        desk.put(name, text("# A"), code(ran, count=None), cell)
    assert message in desk.bind("-p", *option.split())
    assert not (desk.path / "ran").exists()


def test_a_run_with_parameters_says_so_and_changes_nothing(desk):
    cells = [
        text("# A"),
        code("N = 9_000\nH = 1.0", count=None, tags=["parameters"]),
        code("print('N is', N, H)\n1 / (N - 3)", count=None),
        code("import os, ipykernel\n"  # no port that another may take
             "assert os.name == 'nt' or 'ipc' in ipykernel."
             "get_connection_info()", count=None),
        code("import os, pathlib\nf = pathlib.Path(os.environ['FIGURES'])\n"
             "f.mkdir(exist_ok=True)\n(f / 'a.svg').write_text('new');",
             count=None),
    ]  # fmt: skip
    for name in NAMES[0], NAMES[2]:
        desk.put(name, *cells)
    (desk.path / "figures").mkdir()
    (desk.path / "figures/a.svg").write_text("committed")
    before = desk.read(NAMES[0])
    desk.bind("-p", "H", "1e-3", "-p", "03.N", "40", "--code", "none")
    pdf = desk.read("report.pdf")
    title, *rest = words(pdf)
    first, third = "".join(rest).split("2Title")
    assert "inNAME:H=0.001".replace("NAME", NAMES[0]) in title
    assert re.search(r"03_train_flows.ipynb:.*N=40", title)
    assert "Nis90000.001" in first and "Nis400.001" in third
    message = desk.bind("-p", "01.N", "3")
    assert "01_kde.ipynb failed" in message and "ZeroDivision" in message
    interrupt = code("import os\nos.kill(os.getppid(), 2)", count=None)
    desk.put(NAMES[1], text("# B"), interrupt)
    stopped = "error: stopped; the last report stays"
    assert desk.bind("--execute") == stopped
    assert desk.read("report.pdf") == pdf and desk.read(NAMES[0]) == before
    assert desk.read("figures/a.svg") == b"committed"


@pytest.mark.parametrize("cell, message", [
    (code("skipped()", count=None), "was not executed:\nskipped()"),
    (code("x", v4.new_output("error", ename="E", evalue="no")), "an error: E"),
    (text(r"$\underset{x}{y}$"), r"would come out wrong: \underset{x}{y}"),
    (text(r"$\operatorname*{max}_x$"), "would come out wrong"),
    (text(r"$\middle|$"), "TeX unknown to pandoc"),
    (text(r"$$ a \cap b $$"), "Typst says error"),
    (text("\\begin{align} a \\end{align}"), "TeX without $$"),
])  # fmt: skip
def test_what_cannot_be_bound_is_refused_with_its_cell(cell, message):
    with pytest.raises(Refused, match=re.escape(message)) as refused:
        export([text("# A"), cell])
    assert "07_other.ipynb, cell 2" in str(refused.value)


def test_a_notebook_that_is_not_ours():
    attached = text("![a](attachment:p.png) ![far](https://x.invalid/p.png)")
    attached["attachments"] = {"p.png": {"image/png": png()}}
    widget = {"application/vnd.jupyter.widget-view+json": {}}
    cells = [
        text(HOSTILE), attached, text("[other](02_x.ipynb#A) [no](#none)"),
        code("x", shown(text_markdown=HOSTILE), shown(image_png=png()),
             shown(text_markdown="- [1, 2]\n- 0.1 [0.0, 0.2]"),
             shown(text_html="<script>taken()</script>", text_plain="<b>"),
             shown(text_plain="WIDGET", **widget),
             v4.new_output("stream", text="10%\r20%\rdo\x1b[31mne\n"),
             v4.new_output("stream", name="stderr", text="NOISE")),
    ]  # fmt: skip
    page = export(cells, ReportHTMLExporter)
    for said in "".join(words(export(cells))), words(page)[0]:
        for line in "<script>document.title=", "(rm-rfz)", "{=typst}":
            assert said.count(line) == 2, line
        assert "done" in said and "<b>" in said and "otherno" in said
        assert not re.search(r"WIDGET|NOISE|10%|taken\(", said)
    assert len(re.findall(r'<img[^>]*src="data:image/png', page)) == 2
    assert "<li>[1, 2]" in page and "0.1\xa0[0.0,\xa00.2]" in page
    assert page.count("<script>") == 1 and "taken()" not in page


def test_pictures_are_of_the_same_run_as_the_text(tmp_path, monkeypatch):
    monkeypatch.setenv("FIGURES", str(tmp_path))
    drawn, held = Figure(figsize=(2, 1)), []
    drawn.subplots().plot([1, 2])
    keep = lambda shown, metadata: held.append(metadata)  # noqa: E731
    monkeypatch.setattr(plots, "display", keep)
    plots.save_figure(drawn, "mine", "Mine.", [(drawn, "h = 1")])
    again = shown(held[1], text_markdown="*Mine.*")
    cell = code("f", shown(held[0], image_png=png()), again)
    page = export([cell], ReportHTMLExporter)
    assert "data:image/svg+xml" in page and png() not in page
    assert 'data-label="h = 1"' in page and words(page)[0].count("Mine") == 1
    (tmp_path / "mine.svg").write_text("<svg/>")  # of another run
    page = export([cell], ReportHTMLExporter)
    assert "data:image/svg+xml" not in page and png() in page


@pytest.mark.parametrize("mode, printed, page", [
    ("teach", "T", "TH"), ("all", "TH", "TH"), ("none", "", ""),
])  # fmt: skip
def test_code_is_what_teaches_or_all_or_none(mode, printed, page):
    cells = [
        text("of CODE", tags=["about-code"]), code("# NBVAL_CHECK_OUTPUT\nT1"),
        code("H1", shown(text_markdown="kept"), tags=["hide-input"]),
    ]  # fmt: skip
    made = export(cells, ReportHTMLExporter, code=mode)
    pdf = "".join(words(export(cells, code=mode)))
    for said, wanted in (pdf, printed), (words(made)[0], page):
        assert "T" * ("T1" in said) + "H" * ("H1" in said) == wanted
        assert "kept" in said and "NBVAL" not in said
        assert ("ofCODE" in said) == (mode != "none")
    assert made.count("<details>") == (mode == "teach")


def test_the_shell_exports_a_notebook(desk):
    desk.put(NAMES[1], text("# B"), code("lost()", count=None))
    command = [JUPYTER, "nbconvert", "--to", "report", *NAMES[:2]]
    run = subprocess.run(command, cwd=desk.path, capture_output=True)
    assert desk.read("01_kde.pdf").startswith(b"%PDF")
    assert run.returncode
    assert f"{NAMES[1]}, cell 2 was not" in run.stderr.decode()


@pytest.fixture
def server(desk):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = subprocess.Popen([
        JUPYTER, "server", "--no-browser", "--allow-root", f"--port={port}",
        "--IdentityProvider.token=t", "--ServerApp.disable_check_xsrf=True",
        f"--ServerApp.root_dir={desk.path}", CONFIG,
    ], stderr=subprocess.DEVNULL)  # fmt: skip

    def ask(path, **options):
        address = f"http://127.0.0.1:{port}/{path}?token=t"
        request = urllib.request.Request(address, **options)
        return urllib.request.urlopen(request).read()

    for _ in range(150):
        try:
            ask("api")
            break
        except OSError:
            time.sleep(0.2)
    yield ask
    running.terminate()
    running.wait()


def test_jupyter_exports_from_its_menu(desk, server):
    menu = json.loads(server("api/nbconvert"))
    assert menu["report"]["output_mimetype"] == "application/pdf"
    assert menu["report_html"]["output_mimetype"] == "text/html"
    assert server(f"nbconvert/report/{NAMES[0]}")[:4] == b"%PDF"
    assert b"Title" in server(f"nbconvert/report_html/{NAMES[0]}")
    desk.put(NAMES[1], text("# B"), code("lost()", count=None))
    with pytest.raises(urllib.error.HTTPError) as refused:
        server(f"nbconvert/report/{NAMES[1]}")
    assert f"{NAMES[1]}, cell 2 was not" in refused.value.read().decode()


def test_a_committed_notebook_is_saved_as_it_was(desk, server):
    source = "import sys\nprint('ä')\nprint(1, file=sys.stderr)\nprint()"
    desk.put(NAMES[0], code(source, count=None, tags=["x"]))
    command = [JUPYTER, "nbconvert", CONFIG, "--to=notebook", "--execute",
               "--inplace", NAMES[0]]  # fmt: skip
    subprocess.run(command, cwd=desk.path, check=True)
    committed = desk.read(NAMES[0]).decode()
    (output,) = nbformat.reads(committed, 4).cells[0].outputs
    assert output.text == "ä\n\n" and '"x"' in committed
    assert not re.search('iopub|ipykernel|"version"', committed)
    model = json.loads(server(f"api/contents/{NAMES[0]}"))
    about = model["content"]["metadata"]  # what JupyterLab would write itself
    assert about["language_info"]["version"] == platform.python_version()
    assert about["kernelspec"]["display_name"] == "Python 3 (ipykernel)"
    body = json.dumps(model).encode()
    server(f"api/contents/{NAMES[0]}", method="PUT", data=body)
    assert desk.read(NAMES[0]).decode() == committed


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    profile = tmp_path_factory.mktemp("browser")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver, as Debian packages them")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in "headless=new", "no-sandbox", f"user-data-dir={profile}":
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


TYPST = ') #panic("in") //'
SCRIPT = "<script>document.title = 'taken'</script>"
SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="90" height="40"
  onload="alert()">%s<rect width="50" height="20" fill="red"/></svg>"""
INTO = {  # the cells of a notebook
    "notebook metadata": [text("said")],
    "cell metadata": [
        text("said", place=["x\n#panic()\n//", 1], kind="figure"),
        code("said", place=["x\n#panic()\n//", 1], summary=True),
    ],
    "file name": [text("said")],
    "tag": [
        text(f'$$ x \\tag{{1", $b${TYPST}}} $$ said'),
        text('$x \\tag{2"\\}$ said'),
    ],
    "words in a formula": [
        text(f'$\\textbf{{parallel {TYPST}}} \\label{{parallel "a}}$ said'),
        text('$\\operatorname{parallel} \\text{"a dot.circle}$ said'),
    ],
    "links": [text(
        "[said](javascript:alert(1)) [b](JavaScript:alert(1)) "
        "[c](data:,x) <javascript:alert(1)> [d](//x.invalid) "
        "[e](file:///etc/hostname) "
        '[f](/etc/hostname) [g](http://x.invalid/")#panic()//) '
        "[h](02_x.ipynb) [i](../x.html#y)"
    )],
    "caption": [code("f", figure(
        caption=f"- said {SCRIPT} [b](javascript:x)\n- `#panic()`"
    ))],
    "figure's name": [code(
        "f", figure(f'x"{TYPST}\n#panic()'), shown(text_markdown="said")
    )],
    "frames": [code(
        "f", figure(frames=[{"label": f'"{SCRIPT}', "png": png()}]),
        shown(text_markdown="said"),
    )],
    "picture that runs": [
        code("f", shown(**{"image/svg+xml": SVG % SCRIPT})), text("said"),
    ],
    "HTML and raw Typst": [
        text(HOSTILE + "\n\n```{=typst}\n#panic()\n```\n\n<div onclick=x>"
             "<img src=x onerror=alert()></div>\n\nsaid"),
        code("x", shown(text_html=SCRIPT, text_plain="said")),
    ],
    "deep": [text("said\n\n" + "> " * 12 + "x"), text("[" * 99)],
    "lone surrogate and NUL": [text("said \ud800 \0")],
    "language": [text("said")],
    "another caption": [code(
        "f", figure(), shown({"figure_caption": True}, text_markdown="said")
    )],
    "pictures of the web alone": [text("said ![](https://x.invalid/x.png)")],
    "a figure's name twice": [
        code("f", figure("A"), figure("a"), figure("a")), text("[said](#a)"),
    ],
    "a raw cell": [v4.new_raw_cell("said #panic() " + SCRIPT)],
}  # fmt: skip
ABOUT = {  # what else is said of it
    "notebook metadata": {"metadata": {
        "report": {"header-includes": SCRIPT, "title": "taken"},
        "header-includes": SCRIPT, "title": SCRIPT,
    }},
    "file name": {"name": "x\n#panic()\n" + SCRIPT},
    "language": {"metadata": {"language": 5}},
}  # fmt: skip
LINKS = r"https?://x\.invalid/|mailto:|#"


@pytest.mark.parametrize("case", INTO)
def test_nothing_of_a_notebook_runs(case, tmp_path, request):
    """It is words, in the PDF and on the page."""
    given = {"cells": INTO[case]} | ABOUT.get(case, {})
    pdf = export(**given)
    assert "said" in "".join(words(pdf))
    for page in PdfReader(io.BytesIO(pdf)).pages:
        for link in page.get("/Annots", ()):
            action = link.get_object().get("/A", {})
            assert re.match(LINKS, action.get("/URI", "#"))
    made = tmp_path / "page.html"
    made.write_text(export(exporter=ReportHTMLExporter, **given), "utf-8")
    browser = request.getfixturevalue("browser")
    browser.get(made.as_uri())
    title, scripts, names, links, loaded, said = browser.execute_script("""
        const all = [...document.querySelectorAll("*")];
        return [document.title, document.scripts.length,
                all.flatMap((e) => e.getAttributeNames()),
                all.filter((e) => e.hasAttribute("href"))
                   .map((e) => e.getAttribute("href")),
                performance.getEntriesByType("resource").map((e) => e.name),
                document.body.innerText]""")
    assert title == ("07_other" if case != "file name" else title)
    assert "taken" != title and scripts == 1 and "said" in said
    assert not [name for name in names if name.startswith("on")]
    assert all(re.match(LINKS, link) for link in links)
    assert not [name for name in loaded if not name.startswith("data:")]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("exporter", [ReportExporter, ReportHTMLExporter])
@pytest.mark.parametrize("source", [
    "javascript://x", "//x.invalid/x.png", "{tmp}/out.png", "../out.png",
    "..%2Fout.png", "file://{tmp}/out.png", "link.png", "data:image/png,x",
    "attachment:none.png", "in.txt", "cut.png", "loads.svg", "C:/out.png",
])  # fmt: skip
def test_no_other_file_becomes_a_picture(source, exporter, tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    whole = base64.b64decode(png())
    (tmp_path / "out.png").write_bytes(whole)
    (folder / "link.png").symlink_to("../out.png")
    (folder / "cut.png").write_bytes(whole[:60])
    (folder / "in.txt").write_text("in", "utf-8")
    loads = SVG % '<image href="in.png" width="9" height="9"/>'
    (folder / "loads.svg").write_text(loads, "utf-8")
    cell = text(f"![a]({source.format(tmp=tmp_path)})")
    with pytest.raises(Refused, match="07_other.ipynb, cell 1: a picture mus"):
        export([cell], exporter, path=folder)


def test_pictures_of_the_folder_are_shown(tmp_path):
    folder = tmp_path / "Größe: 'a' 日"
    (folder / "b c").mkdir(parents=True)
    (folder / "b c" / "ö\u2028\xa0(1).png").write_bytes(
        base64.b64decode(png())
    )
    (folder / "c.svg").write_text(SVG % "", "utf-8")
    cells = [
        text(
            "![a](<b c/ö\u2028\xa0(1).png>) ![c](./c.svg) "
            "![b](b%20c/ö%E2%80%A8%C2%A0(1).png)"
        )
    ]
    pdf = PdfReader(io.BytesIO(export(cells, path=folder)))
    assert len(pdf.pages[0].images) >= 1
    page = export(cells, ReportHTMLExporter, path=folder)
    assert page.count("data:image/png") == 2
    assert page.count("data:image/svg") == 1


@pytest.mark.parametrize("exporter", [ReportExporter, ReportHTMLExporter])
@pytest.mark.parametrize("cell, message", [
    (text(r"$\input{/etc/hostname}$"), "TeX unknown to pandoc"),
    (text("$$\\include{x}$$"), "TeX unknown to pandoc"),
    (text("| a | b |\n|--|--|\n| 1 | 2 | 3 |"), "got | 1 | 2 | 3 |"),
    (code("t", shown(text_markdown="|a|b|\n|-|-|\n|1\n2|3|")), "got |1"),
    (code("f", figure(frames=[{"label": "x", "png": "no"}])), "a frame of a_"),
    (code("f", shown(image_png="no")), "a picture must be"),
    (text(r"$$ x \tag{1} \tag{2} $$"), "TeX with two tags"),
    (text("$" + "x^{" * 30 + "x" + "}" * 30 + "$"), "pandoc took over 3 s"),
])  # fmt: skip
def test_what_would_be_lost_is_refused_with_its_cell(exporter, cell, message):
    cells = [text("# A"), cell]
    with pytest.raises(Refused, match=re.escape(message)) as refused:
        export(cells, exporter, patience=3)
    assert "07_other.ipynb, cell 2" in str(refused.value)


def test_an_error_of_typst_before_the_first_cell_names_the_file(tmp_path):
    template = tmp_path / "template.typ"
    template.write_text('#panic("early")\n$body$', "utf-8")

    class Early(ReportExporter):
        writer = ["--to=typst", f"--template={template}"]

    with pytest.raises(Refused, match="07_other.ipynb: Typst says .*early"):
        export([text("A")], Early)


def test_headings_of_other_alphabets_are_places():
    heads = "# Größe\n\n# Grüße\n\n# 大小\n\n# Result\n\n# this\n\n"
    cell = text(
        heads + "[a](#Größe) [b](#Gr%C3%BC%C3%9Fe) [c](#大小) [d](#This)"
    )
    page = export([cell], ReportHTMLExporter)
    links = re.findall(r'href="#([^"]*)">[abcd]<', page)
    assert links == ["größe-1", "grüße-1", "大小-1", "this-1"]
    assert page.count('href="#result-1"') == page.count('id="result-1"') == 1
    pdf = PdfReader(io.BytesIO(export([cell])))
    assert all(name in str(pdf.outline) for name in ("Result", "this"))
    ends = [link.get_object() for link in pdf.pages[0]["/Annots"]]
    assert len({str(end["/Dest"]) for end in ends}) == 4


def test_any_locale_and_path_will_do(desk):
    """Of a machine that takes all files for ASCII, and prints cp1252."""
    odd = desk.path / "Größe: 'x' 日"
    shutil.copytree(ROOT / "report", odd / "report",
                    ignore=shutil.ignore_patterns("report.*"))  # fmt: skip
    desk.put(NAMES[0], text("# 1 Größe\n\n“日” [x](#1-Größe) ![b](<b ö.png>)"))
    (desk.path / "b ö.png").write_bytes(base64.b64decode(png()))
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    env = os.environ | locale | {"PYTHONIOENCODING": "cp1252"}
    options = "--notebooks", desk.path, "--output", odd
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-m", "report",
         *options], cwd=odd, env=env, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.decode().splitlines()
    assert not [
        line for line in lines if "EncodingW" in line and "x' " in line
    ]
    page = (odd / "report.html").read_text("utf-8")
    assert "“日”" in page and "data:image/png" in page
    assert "Größe" in "".join(words((odd / "report.pdf").read_bytes()))


@pytest.mark.parametrize("cells", [
    [], [text("")], [text(""), text("# Late"), text("it", tags=["summary"])],
    [text("no heading"), text("it", tags=["summary"])],
])  # fmt: skip
def test_a_notebook_may_lack_cells_and_headings(desk, cells):
    for name in NAMES[:3]:
        desk.put(name, *cells)
    assert desk.bind() == ""
    _, front, *_ = words(desk.read("report.pdf"))
    if len(cells) > 1:
        name = "Late" if len(cells) == 3 else NAMES[0]
        assert f"Summary{name}it" in front


@pytest.mark.parametrize("content, message", [
    (b'{"cells": [', "is not a whole notebook"), (b"", "is not a whole noteb"),
    (b"\xff\xfe", "is not a whole notebook"), (b"[]", "is not a whole noteb"),
    (b"[" * 9999, "is not a whole notebook"),
    (b'{"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": ['
     b'{"cell_type": "markdown", "metadata": {}, "source": 5}]}',
     ", cell 1 must be a notebook, but 5"),
], ids=str)  # fmt: skip
def test_a_damaged_file_is_refused_and_the_last_report_stays(
    desk, content, message
):
    desk.bind()
    pdf = desk.read("report.pdf")
    (desk.path / NAMES[1]).write_bytes(content)
    for options in ((), ("-p", "N", "3")):
        said = desk.bind(*options)
        assert said.startswith(f"error: {NAMES[1]}") and message in said
        assert said.endswith("the last report stays")
    assert desk.read("report.pdf") == pdf
    assert not [*desk.path.glob("report.*.*"), *desk.path.glob("report.?*_*")]


def test_what_was_injected_is_said_in_words(desk):
    source = f'A = "`{SCRIPT}`" #panic()\nB = "`#panic()`{{=typst}}"'
    cell = code(source, tags=["injected-parameters"])
    desk.put(NAMES[0], text("# A"), cell)
    assert desk.bind() == ""
    title, *_ = words(desk.read("report.pdf"))
    assert "<script>document.title=" in title and '`{=typst}"' in title
    assert desk.read("report.html").count(b"<script>") == 1


def test_two_runs_at_once_may_share_a_folder(desk):
    command = [sys.executable, "-m", "report", "--notebooks", desk.path,
               "--output", desk.path]  # fmt: skip
    both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [run.wait() for run in both] == [0, 0]
    assert len(words(desk.read("report.pdf"))) > 1
    assert b"</html>" in desk.read("report.html")
    assert {p.name for p in desk.path.glob("report*")} == {
        "report.pdf", "report.html"}  # fmt: skip


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(desk):
    ran = code(f"open({str(desk.path / 'ran')!r}, 'w')", count=None)
    desk.put(NAMES[0], text("# A"), ran)
    (desk.path / "file").write_text("", "utf-8")
    said = desk.bind("--execute", "--output", str(desk.path / "file"))
    assert "error: " in said and "file" in said
    assert not (desk.path / "ran").exists()


@pytest.mark.parametrize("rule", ["relative", "absolute", "empty", "file"])
def test_one_rule_says_where_figures_are(rule, tmp_path, monkeypatch):
    """Of save_figure and of the exporters, wherever they are started."""
    kept = tmp_path / "kept"
    named = {"relative": os.path.relpath(kept, ROOT), "empty": ""}
    monkeypatch.setenv("FIGURES", named.get(rule, str(kept)))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    if rule == "file":
        kept.write_text("", "utf-8")
    drawn, held = Figure(figsize=(2, 1)), []
    keep = lambda shown, metadata: held.append(metadata)  # noqa: E731
    monkeypatch.setattr(plots, "display", keep)
    with warnings.catch_warnings(record=True) as said:
        plots.save_figure(drawn, "mine", "Mine.")
    assert len(said) == (rule == "file")
    copied = rule in ("relative", "absolute")
    assert [*tmp_path.rglob("*.svg")] == [kept / "mine.svg"] * copied
    page = export([code("f", shown(held[0], image_png=png()))],
                  ReportHTMLExporter)  # fmt: skip
    assert ("data:image/svg+xml" in page) == copied
    with pytest.raises(ValueError, match="name must be of letters"):
        plots.save_figure(drawn, "../mine")


def test_the_page_works_offline_and_on_a_telephone(desk, browser):
    colors = "red", "teal", "navy"
    frames = [{"label": f"h = {c}", "png": png(c)} for c in colors]
    wide = "|" + " long column |" * 20 + "\n|" + "--:|" * 20
    formula = "$$ " + " + ".join(["x_{12} y^2"] * 30) + r" \tag{2}$$"
    desk.put(
        NAMES[0], text("# 1 A\n\n" + "A sentence. " * 40), text(formula),
        text(wide), code("x" * 200), code("f", figure(frames=frames)),
    )  # fmt: skip
    desk.bind()
    browser.set_window_size(1300, 900)
    browser.get((desk.path / "report.html").as_uri())
    run = browser.execute_script
    loaded = run("return performance.getEntries().map((e) => e.name)")
    assert not [name for name in loaded if name.startswith("http")]
    assert run("return document.querySelector('math').clientHeight") > 5
    slider = browser.find_element("css selector", "input[type=range]")
    slider.send_keys("\ue014")  # the right arrow key
    image = browser.find_element("css selector", "figure img")
    assert frames[1]["png"] in image.get_attribute("src")
    assert browser.find_element("tag name", "output").text == "h = teal"
    image.click()
    assert run("return document.querySelector('dialog').open")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True,
    })  # fmt: skip
    browser.refresh()
    assert run("return document.documentElement.scrollWidth") == 390
    assert browser.get_log("browser") == []


def test_answers_unfold_on_the_screen_and_end_the_report_on_paper():
    answers = ("<details><summary>Answers</summary>\n\n1. Because $x^2$.\n\n"
               "</details>")  # fmt: skip
    cells = [text("# 7 Title\n\nWhy?"), text(answers, tags=["answers"]),
             text("## Afterwards\n\nMore.")]  # fmt: skip
    paper = "".join(words(export(cells, name="07_other")))
    assert "<details>" not in paper and "Answers" in paper
    places = [paper.rindex(w) for w in ("More.", "Notebook7", "Because")]
    assert places == sorted(places)
    page = export(cells, ReportHTMLExporter)
    folded = page.split("<summary>Answers</summary>")[1]
    inside, _, behind = folded.partition("</details>")
    assert "Because" in inside and "More." in behind


def test_pictures_on_paper_have_alternative_texts():
    caption = r'Of "x", $x^2$ and \\) #panic("in").'
    pdf = export([code("f", figure(caption=caption))])
    found, parts = [], [PdfReader(io.BytesIO(pdf)).root_object]
    while parts:
        part = parts.pop().get_object()
        if isinstance(part, dict):
            found += [part["/Alt"]] if part.get("/S") == "/Figure" else []
            part = [part.get(k) for k in ("/StructTreeRoot", "/K")]
        parts += filter(None, part if isinstance(part, list) else [])
    assert found == [r"Of “x”, x^2 and \) #panic(“in”)."]


def test_the_page_can_be_read_by_everybody(desk, browser):
    """Its language and main part are named, keys scroll what is wide, no
    heading's level is skipped, and code stands out from its ground."""
    source = (
        "@at\ndef f(x):  # why\n    return 'a', f'b{x}', 1, 0.5, 0x1F, True"
    )
    wide = code(source + " or" * 80 + " x")
    results = text("## Results\n\n1", tags=["summary"])
    desk.put(NAMES[0], text("# 1 A"), wide, results)
    desk.bind()
    browser.get((desk.path / "report.html").as_uri())
    run = browser.execute_script
    assert run("return document.documentElement.lang") == "en"
    levels = run("""return [...document.querySelectorAll('main :is(h1, h2, h3)'
      )].map((heading) => +heading.tagName[1])""")
    assert max(b - a for a, b in itertools.pairwise(levels)) == 1
    assert run("return document.querySelector('pre.python').tabIndex") == 0
    colors = run("""return [...document.querySelectorAll('pre.python span')]
      .map((span) => getComputedStyle(span).color.match(/[0-9]+/g))""")
    ground = run("""return getComputedStyle(document.querySelector(
      'pre.python')).backgroundColor.match(/[0-9]+/g)""")
    ground, *colors = ([int(c) for c in rgb[:3]] for rgb in (ground, *colors))
    assert len({tuple(rgb) for rgb in colors}) > 4
    assert min(contrast(ground, rgb) for rgb in colors) >= 4.5


def contrast(*colors):
    """Of two sRGB colours, from 1 to 21. (WCAG 2.2)"""
    shares = np.array(colors) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92,
                      ((shares + 0.055) / 1.055) ** 2.4)  # fmt: skip
    dark, light = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (light + 0.05) / (dark + 0.05)
