"""The binder, on small notebooks of its own."""

import base64
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat.v4 as v4
import pandas as pd
import pytest
from nbformat import read, write
from PIL import Image
from pypdf import PdfReader

BUILD = Path(__file__).parents[1] / "report" / "build.py"
sys.path.insert(0, str(BUILD.parent))

import build  # noqa: E402

SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="200pt" height="90pt">
<rect width="200pt" height="90pt" fill="teal"/></svg>"""
HOSTILE = [
    '#import "x"',
    '#panic("printed")',
    "os.execute('ls')",
    "<script>document.title = 'taken'</script>",
    "$(rm -rf nothing)",
    "*/ ]] }} --> `#eval(1)`",
]


def png(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), color).save(buffer, "png")
    return buffer.getvalue()


def text(source):
    return v4.new_markdown_cell(source)


def code(source, *outputs, count=1, **metadata):
    return v4.new_code_cell(
        source, outputs=list(outputs), execution_count=count, metadata=metadata
    )


def shown(metadata=None, **data):
    data = {key.replace("_", "/"): value for key, value in data.items()}
    return v4.new_output("display_data", data=data, metadata=metadata or {})


def stream(words, name="stdout"):
    return v4.new_output("stream", name=name, text=words)


def figure(name="a_figure", caption="A caption with $x^2$.", frames=()):
    about = {"figure": name, "caption": caption}
    if frames:
        about["frames"] = frames
    pixels = base64.b64encode(png()).decode()
    return [
        shown(about, image_png=pixels, text_plain="<Image>"),
        shown({"figure_caption": True}, text_markdown=f"*{caption}*"),
    ]


class Desk:
    """Folders of notebooks and figures, and what binding them gives."""

    def __init__(self, path):
        self.path = path
        for name in ("notebooks", "figures", "out"):
            (path / name).mkdir()

    def put(self, *cells, name="01_first"):
        notebook = v4.new_notebook(cells=list(cells))
        write(notebook, self.path / "notebooks" / f"{name}.ipynb")
        return self

    def run(self, *options):
        """-> exit code, what it said on stderr."""
        said = io.StringIO()
        options = [*options, "--figures", self.path / "figures"]
        options += ["--notebooks", self.path / "notebooks"]
        options += ["--output", self.path / "out"]
        with contextlib.redirect_stderr(said):
            try:
                code = build.main([str(option) for option in options])
            except SystemExit as left:
                code = left.code
        return code, said.getvalue()

    def bind(self, *options):
        code, said = self.run(*options)
        assert code == 0, said
        return self

    def refuse(self, *options, code=1):
        found, said = self.run(*options)
        assert found == code, said
        return said

    @property
    def pdf(self):
        return PdfReader(self.path / "out" / "report.pdf")

    @property
    def printed(self):
        return "\n".join(page.extract_text() for page in self.pdf.pages)

    @property
    def html(self):
        return (self.path / "out" / "report.html").read_text()

    @property
    def bytes(self):
        out = sorted((self.path / "out").iterdir())
        return {path.name: path.read_bytes() for path in out}


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def words(page):
    """The words of HTML, as a reader sees them."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.S)
    page = re.sub(r"<[^>]*>", "", page)
    for entity, sign in [
        ("lt", "<"),
        ("gt", ">"),
        ("quot", '"'),
        ("#39", "'"),
    ]:
        page = page.replace(f"&{entity};", sign)
    return page.replace("&amp;", "&")


def squeezed(string):
    return re.sub(r"\s", "", string)


def test_text_of_other_languages_stays_text(desk):
    lines = "\n".join(HOSTILE)
    raw = (
        '```{=typst}\n#panic("raw block")\n```\n\n'
        "```{=html}\n<b>raw html</b>\n```\n\n"
        "`#panic(1)`{=typst} <script>document.title = 'x'</script>\n\n"
        '#import "y"\n\n<div onclick="z">\n#panic\n</div>\n\n'
        "\\input{/etc/passwd} \\newcommand{\\x}{y}\n\n---\n\n- z"
    )
    desk.put(
        text("# Title"),
        text(raw),
        code(lines, stream(lines)),
        code("say", shown(text_markdown=raw)),
        code("html", shown(text_html="<script>taken()</script>",
                           text_plain="fallback <b>")),
    ).bind()  # fmt: skip
    printed, page = squeezed(desk.printed), squeezed(words(desk.html))
    for line in HOSTILE:
        assert printed.count(squeezed(line)) == 2
        assert page.count(squeezed(line)) == 2
    for line in [
        '#panic("raw block")', "<b>raw html</b>", "{=typst}", '#import "y"',
        '<div onclick="z">', "\\input{/etc/passwd}",
    ]:  # fmt: skip
        assert printed.count(squeezed(line)) == 2, line
        assert page.count(squeezed(line)) == 2, line
    assert squeezed("fallback <b>") in printed
    assert "taken()" not in desk.html
    assert desk.html.count("<script>") == 1  # its own


def test_an_error_output_is_refused(desk):
    error = v4.new_output(
        "error", ename="ValueError", evalue="no", traceback=[]
    )
    desk.put(text("# Title"), code("fail()", error))
    message = desk.refuse()
    assert "01_first.ipynb, cell 2" in message and "ValueError: no" in message


def test_a_cell_that_never_ran_is_refused(desk):
    desk.put(text("# Title"), code("skipped()", count=None), code("  "))
    message = desk.refuse()
    assert "01_first.ipynb, cell 2" in message and "skipped()" in message


def test_unknown_parameters_are_refused_before_anything_runs(desk):
    tags = {"tags": ["parameters"]}
    desk.put(text("# A"), code("EPOCHS = 250\nSEEDS: int = 8", **tags))
    desk.put(text("# B"), code("SEEDS = 4\nfail()", **tags), name="02_second")
    message = desk.refuse("--execute", "-p", "EPOCH", "3", code=2)
    assert "EPOCH." in message and "01_first.ipynb: 250" in message
    assert "01_first.ipynb: 8; 02_second.ipynb: 4" in message
    assert "-p needs --execute" in desk.refuse("-p", "SEEDS", "3", code=2)
    assert "-p needs" in desk.refuse(
        "--in-place", "--execute", "-p", "SEEDS", "3", code=2
    )


def test_running_with_parameters_and_failing(desk):
    """One notebook that first runs, and fails at another setting."""
    desk.put(
        text("# Title"),
        code("N = 2\nRATE = 1.0", tags=["parameters"], count=None),
        text("Between."),
        code(
            "import os, pathlib\n"
            "pathlib.Path(os.environ['FIGURES']).mkdir()\n"
            "print('N is', N + 40, type(RATE).__name__, os.getcwd())",
            count=None,
        ),
        code("# the last\n1 / (N - 3)", count=None),
    )
    before = (desk.path / "notebooks/01_first.ipynb").read_bytes()
    desk.bind("--execute", "-p", "N", "1", "-p", "RATE", "1e-3")
    folder = squeezed(str(desk.path / "notebooks"))
    assert f"Nis41float{folder}" in squeezed(desk.printed)
    held = desk.bytes
    message = desk.refuse("--execute", "-p", "N", "3")
    assert "01_first.ipynb, cell 5 failed: # the last" in message
    assert "ZeroDivisionError: division by zero" in message
    assert desk.bytes == held
    assert not list((desk.path / "figures").iterdir())
    assert (desk.path / "notebooks/01_first.ipynb").read_bytes() == before


def test_in_place_keeps_clean_notebooks_and_figures(desk):
    desk.put(
        text("# Title"),
        code(
            "import os, pathlib, sys\n"
            "folder = pathlib.Path(os.environ['FIGURES'])\n"
            "folder.mkdir(exist_ok=True)\n"
            "_ = (folder / 'new.svg').write_text('<svg/>')\n"
            "print('out')\nprint('noise', file=sys.stderr)\nprint('more')",
            count=None,
        ),
    ).bind("--in-place")
    path = desk.path / "notebooks" / "01_first.ipynb"
    first = path.read_bytes()
    for word in (b"papermill", b"iopub", b'version": "3'):
        assert word not in first
    (output,) = read(path, as_version=4).cells[1].outputs
    assert output.text == "out\nmore\n"
    assert (desk.path / "figures" / "new.svg").read_text() == "<svg/>"
    assert not desk.bytes  # binds nothing
    desk.bind("--in-place")
    assert path.read_bytes() == first
    desk.put(text("# A"), code("1", tags=["injected-parameters"]))
    assert "injected" in desk.refuse("--in-place")


def test_a_kernel_that_dies_is_reported_with_its_cell(desk):
    desk.put(text("# A"), code("# bye\nimport os; os._exit(3)", count=None))
    message = desk.refuse("--execute")
    assert "01_first.ipynb, cell 2 (# bye)" in message


def test_the_same_notebooks_give_the_same_bytes(desk, tmp_path):
    (desk.path / "figures" / "a_figure.svg").write_text(SVG)
    desk.put(
        text("# Title\n\n$x$ and [^1]\n\n[^1]: note"), code("f", *figure())
    )
    first = desk.bind().bytes
    other = tmp_path / "elsewhere"
    other.mkdir()
    moved = Desk(other)
    for name in ("notebooks", "figures"):
        shutil.copytree(desk.path / name, other / name, dirs_exist_ok=True)
    assert moved.bind().bytes == first
    assert sorted(first) == ["report.html", "report.pdf"]


TRAPS = [
    r"\odot \otimes \ominus \cap \bigcap \bigodot \bigotimes",
    r"\begin{vmatrix} a & b \\ c & d \end{vmatrix}",
    r"\begin{Vmatrix} a & b \\ c & d \end{Vmatrix}",
    r"\big| x \Big| y \bigg\| \bigl( z \bigr) \big\{ \big\} \Big[ a \Big]",
    r"a \! b \; c \, d \: e",
    r"\operatorname*{arg\,min}_x \operatorname{KL}(p \,\|\, q)",
    r"\underset{x \sim p}{\mathbb{E}} f \overset{!}{=} g",
    r"\left\| x, y \right\|_2 \left. \frac{a}{b} \right|_{x = 0} |x|_2 \|x\|",
    r"\begin{cases} 1 & \text{if } x \\ 0 & \text{otherwise} \end{cases}",
    r"\text{sect in parallel ∥ dot.circle |} \mathrm{sect}",
    r"\sum_{\substack{i \\ j}} \left|\det \frac{a}{b}\right| p \parallel q",
]


def test_formulas(desk):
    align = "\\begin{align}\na &= b \\\\\n- c &= d % remark\n\\end{align}"
    desk.put(
        text("# Title"),
        *[text(f"Inline ${tex}$\n\n$$\n{tex}\n$$") for tex in TRAPS],
        text(align),
        text("$$\na\n- b\n= c \\tag{2.1}\n$$"),
        text("$$ a \\tag{2.1a} $$ and `$$` and `\\begin{align}`"),
    ).bind()
    assert desk.html.count('display="block"') == len(TRAPS) + 3
    assert "(2.1)" in desk.printed and "(2.1a)" in desk.printed
    assert re.search(r'class="tag">\(2\.1\)<', desk.html)
    assert "tag{" not in re.sub("<annotation.*?</annotation>", "", desk.html)
    assert "<munder><mi" in desk.html
    printed = squeezed(desk.printed)
    assert "⊙⊗⊖∩" in printed and "remark" not in printed
    assert squeezed("and $$ and \\begin{align}") in printed
    assert squeezed("sect in parallel ∥ dot.circle |") in printed
    assert not re.search("[\ue000-\ue0ff]", printed + desk.html)


def test_tex_that_cannot_be_converted_is_refused(desk):
    desk.put(text("# Title"), text("Here $a + \\nosuchthing{b}$."))
    message = desk.refuse()
    assert "01_first.ipynb: TeX that" in message
    assert "\\nosuchthing{b}" in message and not desk.bytes
    for tag in ('\\tag{1") #panic("}', r"\tag{1} \tag{2}"):
        desk.put(text("# Title"), text(f"$$a {tag}$$"))
        assert "\\tag" in desk.refuse()


def test_figures_are_numbered_and_captioned_once(desk):
    (desk.path / "figures" / "a_figure.svg").write_text(SVG)
    desk.put(text("# A"), code("f", *figure()))
    desk.put(
        text("# B"),
        code("g", *figure(caption="Second, gone from the folder.", name="no")),
        code("h", shown(image_png=base64.b64encode(png()).decode())),
        code("i", shown({"figure_caption": True}, text_markdown="A remark")),
        name="02_second",
    ).bind()
    for whole in (desk.printed, words(desk.html)):
        assert whole.count("A caption with") == 1
        assert "Figure 1:" in whole and "Figure 2:" in whole
        assert "Figure 3" not in whole and "A remark" in whole
    assert desk.html.count("data:image/svg+xml,") == 1
    assert desk.html.count("data:image/png;base64") == 2
    assert desk.html.count("<figcaption") == 2


def frames(desk, count):
    for k in range(count):
        shade = png((10 * k, 0, 0))
        (desk.path / "figures" / f"slide-{k:02d}.png").write_bytes(shade)
    about = [
        {"label": f"h = {k}", "text": f"Text {k}, $k = {k}$"}
        for k in range(count)
    ]
    return figure("slide", "Frames.", about)


def test_frames_become_a_slider_of_the_page_on_the_screen(desk):
    (desk.path / "figures" / "slide.svg").write_text(SVG)
    desk.put(text("# Title"), code("f", *frames(desk, 3))).bind()
    assert re.search(r'<input type="range" [^>]*aria-label="', desk.html)
    assert desk.html.count("data:image/png;base64") == 3
    assert "svg+xml" not in desk.html and "<button" not in desk.html
    assert "Text 2," in desk.html and "Text 2," not in desk.printed
    desk.put(text("# Title"), code("f", *frames(desk, 13))).bind()
    assert "<button" in desk.html
    (desk.path / "figures" / "slide-07.png").unlink()
    assert "slide-07.png" in desk.refuse()


def test_references_are_merged(desk):
    first = "## References\n\n- [3] Dinh, *Real NVP*, 2017.\n- [1] Scott."
    desk.put(
        text("# A\n\nSee [[3]](#References), [[1, 3]](#References)."),
        text(first),
    )
    second = "## References\n\n[2] Old.\n[3] Dinh, *Real NVP*, 2017."
    desk.put(text("# B\n\n[[2]](#References)"), text(second), name="02_b")
    desk.bind()
    assert [entry["/Title"] for entry in desk.pdf.outline] == [
        "A", "B", "References",
    ]  # fmt: skip
    page = desk.html
    assert page.count('href="#ref-3"') == 2 and page.count("Dinh") == 1
    order = [page.index(f'id="ref-{k}"') for k in (1, 2, 3)]
    assert order == sorted(order)
    last = desk.pdf.pages[-1].extract_text()
    assert re.search(r"\[1\]\s*Scott.*\[2\]\s*Old.*\[3\]\s*Dinh", last, re.S)

    desk.put(text("# B"), text(second.replace("2017", "2016")), name="02_b")
    message = desk.refuse()
    assert "[3]" in message and "01_first" in message and "02_b" in message
    desk.put(text("# B\n\n[[9]](#References)"), text(second), name="02_b")
    assert "[9]" in desk.refuse()


def test_links_lead_within_the_report(desk):
    desk.put(
        text(
            "# A\n\n[next](02_b.ipynb), [it](02_b.ipynb#Task-3:-The-width-h)"
        ),
        text("## Same\n\n[up](#A) [code](../helpers.py) [w](https://x.org/)"),
    )
    desk.put(text("# B\n\n## Task 3: The width $h$\n\n## Same"), name="02_b")
    desk.bind()
    page = desk.html
    targets = re.findall(r"<main.*", page, re.S)[0]
    links = re.findall(r'<a\s+href="([^"]*)"', targets)
    inside = [link[1:] for link in links if link.startswith("#")]
    assert len(inside) == 3 and links.count("https://x.org/") == 1
    identifiers = re.findall(r' id="([^"]*)"', page)
    assert len(set(identifiers)) == len(identifiers)
    assert set(inside) <= set(identifiers)
    assert "helpers.py" not in page and "code" in words(page)
    contents = desk.pdf.pages[1].extract_text()
    assert re.search(r"Task 3: The width.*\d", contents)
    for target in ("02_b.ipynb#Nowhere", "09_x.ipynb", "#No", "javascript:x"):
        desk.put(text(f"# A\n\n[there]({target})"))
        assert target in desk.refuse()


def test_code_can_be_left_out(desk):
    desk.put(text("# A"), code("secret = 1", stream("kept\n"))).bind()
    assert "secret" in desk.printed and "secret" in words(desk.html)
    desk.bind("--no-code")
    assert "secret" not in desk.printed + desk.html
    assert "kept" in desk.printed and "kept" in desk.html


def test_tables_and_streams(desk):
    table = pd.DataFrame({"model": ["KDE <b>", "flow"], "kl": [0.25, -1.5]})
    named = table.set_index("model")
    desk.put(
        text("# A"),
        code("t", shown(text_html=table._repr_html_(), text_plain="PLAIN")),
        code("u", shown(text_html=named._repr_html_(), text_plain="PLAIN")),
        code(
            "v",
            stream("one\x1b[31m\n"),
            stream("NOISE 10%\r", name="stderr"),
            stream("10%\r20%\rdone\n"),
        ),
        code(
            "w",
            v4.new_output(
                "display_data",
                data={
                    "application/vnd.jupyter.widget-view+json": {},
                    "text/plain": "WIDGET",
                },
            ),
        ),
    ).bind()
    page, printed = desk.html, desk.printed
    assert page.count("<table") == 2 and "KDE &lt;b&gt;" in page
    assert len(re.findall(r'<td style="text-align: right;">0.25', page)) == 2
    assert page.count("<thead>") == 2 and page.count("<tr") == 6
    for word in ("NOISE", "WIDGET", "PLAIN", "10%", "scoped", "\x1b"):
        assert word not in printed and word not in words(page)
    assert "one" in printed and "done" in printed and "KDE <b>" in printed


def test_a_line_of_79_columns_fits(desk):
    line = ("x = 1  # " + "0123456789" * 8)[:79]
    desk.put(text("# A"), code(f"if x:\n{line}", stream(line))).bind()
    assert desk.printed.count(line) == 2


def test_an_interrupt_leaves_nothing_half_written(desk):
    mark = desk.path / "started"
    desk.put(
        text("# A"),
        code(f"open({str(mark)!r}, 'w').close()", count=None),
        code("import time; time.sleep(60)", count=None),
    )
    command = [sys.executable, BUILD, "--execute", "--notebooks"]
    command += [desk.path / "notebooks", "--output", desk.path / "out"]
    run = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(desk.path)},
    )  # fmt: skip
    for _ in range(300):
        if mark.exists():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    _, message = run.communicate(timeout=30)
    assert run.returncode == 130 and "stopped" in message
    assert "Traceback" not in message
    assert not desk.bytes and not list(desk.path.glob("report-*"))


FLAGS = """--headless=new --no-sandbox --disable-gpu --no-first-run
--disable-background-networking --disable-component-update
--disable-sync""".split()


@pytest.fixture
def browser(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver, as Debian packages them")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    opened = webdriver.Chrome(options=options, service=service)
    yield opened
    opened.quit()


def test_the_page_works_offline_and_on_a_telephone(desk, browser):
    wide = pd.DataFrame({f"a long column {k}": [k / 7] for k in range(20)})
    (desk.path / "figures" / "03_overview.svg").write_text(SVG)
    desk.put(
        text("# A\n\n" + "A sentence. " * 40 + "$a_1$"),
        text(r"$$ " + " + ".join(["x_{12} y^2"] * 30) + r" \tag{2}$$"),
        code("x = 1  # " + "y" * 200, stream("z" * 300)),
        code("t", shown(text_html=wide._repr_html_(), text_plain="")),
        code("f", *frames(desk, 13)),
    ).bind()
    browser.set_window_size(1300, 900)
    browser.get((desk.path / "out" / "report.html").as_uri())
    run = browser.execute_script
    assert browser.get_log("browser") == []
    loaded = run("""return performance.getEntries()
        .map((entry) => entry.name).filter((name) => /^https?:/.test(name))""")
    assert loaded == []
    heights = run("""return [...document.querySelectorAll("math")]
        .map((math) => math.getBoundingClientRect().height)""")
    assert len(heights) >= 2 + 1 and heights[0] > 5 and heights[1] > 10

    def frame():
        return run("""const box = document.querySelector(".frames");
        const all = [...box.querySelectorAll(".frame")]
            .filter((frame) => frame.offsetHeight > 0);
        return [all.length, all[0].querySelector("img").src,
            all[0].innerText, box.querySelector("output").value,
            all[0].querySelector("img").naturalWidth]""")

    count, image, said, label, width = frame()
    assert (count, label, width) == (1, "h = 0", 60) and "Text 0" in said
    slider = browser.find_element("css selector", "input[type=range]")
    slider.send_keys("\ue014")  # the right arrow key
    count, other, said, label, _ = frame()
    assert (count, label) == (1, "h = 1") and "Text 1" in said
    assert other != image
    browser.find_element("css selector", ".controls button").click()
    assert browser.find_element("tag name", "button").text == "Pause"

    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True,
    })  # fmt: skip
    browser.refresh()
    assert run("return innerWidth") == 390
    assert run("return document.documentElement.scrollWidth") == 390
    browser.save_screenshot(str(desk.path / "narrow.png"))
