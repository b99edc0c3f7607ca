"""Exporters for nbconvert: an executed notebook as a PDF and as a page.

    jupyter nbconvert --to report notebooks/02_coupling_math.ipynb

Also in Jupyter's menu, File > Save and Export Notebook As. A notebook is
laid out as a list of plain cells, one for each thing that the reader sees;
pandoc reads them, filter.lua makes figures, links and formulas of them, and
Typst sets the PDF. `python -m report` binds several notebooks into one.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pypandoc
import typst
from nbconvert.exporters import Exporter
from nbconvert.filters import strip_ansi
from nbconvert.utils.exceptions import ConversionException
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from traitlets import Enum, Unicode, default
from traitlets.config import Config

HERE = Path(__file__).parent
READER = "ipynb-raw_html+smart"
PICTURES = {
    "image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg",
}  # fmt: skip
WIDGET = "application/vnd.jupyter.widget-view+json"


class Refused(ConversionException):
    """What the author of the notebook can mend, and where."""


def merge(notebooks, **about):
    """{file name: notebook} as one notebook whose cells know their place.
    about: title, subtitle, ... of the document."""
    cells, changed = [], []
    for name, notebook in notebooks.items():
        for number, cell in enumerate(notebook.cells, 1):
            cell.metadata["place"] = [name, number]
            cell.id = f"cell-{len(cells)}"
            cells.append(cell)
            if "injected-parameters" in cell.metadata.get("tags", ()):
                lines = [
                    line for line in cell.source.split("\n") if "=" in line
                ]
                changed.append(f"{Path(name).stem}: `{', '.join(lines)}`")
    if changed:
        about["parameters"] = changed
    return new_notebook(cells=cells, metadata={"report": about})


class ReportExporter(Exporter):
    """A notebook as a PDF."""

    export_from_notebook = "Report (PDF)"
    output_mimetype = "application/pdf"
    to = "typst"
    options = (f"--template={HERE / 'template.typ'}", "--syntax-highlighting=idiomatic")

    code = Enum(
        ["teach", "all", "none"], "teach",
        help="which code to show: without cells tagged hide-input (a page "
        "folds it), all of it, or none",
    ).tag(config=True)  # fmt: skip
    figures = Unicode(
        help="folder of the figures' vector copies; beside the notebooks'"
    ).tag(config=True)

    @default("file_extension")
    def _file_extension(self):
        return ".pdf"

    @property
    def default_config(self):
        return Config({"CoalesceStreamsPreprocessor": {"enabled": True}})

    def from_notebook_node(self, nb, resources=None, **kw):
        nb, resources = super().from_notebook_node(nb, resources, **kw)
        about = resources.get("metadata", {})
        folder = Path(about.get("path") or os.curdir).resolve()
        name = f"{about.get('name', 'notebook')}.ipynb"
        self.copies = Path(self.figures or folder.parent / "figures")
        flat = new_notebook()
        for number, cell in enumerate(nb.cells, 1):
            place = cell.metadata.get("place", [name, number])
            flat.cells += self.lay_out(cell, *place)
        meta = {"code": self.code} | nb.metadata.get("report", {})
        if "title" not in meta:
            meta["pagetitle"] = about.get("name", "notebook")
        with tempfile.TemporaryDirectory(prefix="report-") as work:
            work = Path(work).resolve()
            text = self.pandoc(work, flat, meta, folder)
            return self.finish(work, text), resources

    def lay_out(self, cell, notebook, number):
        """One cell for each thing that the reader of the report sees."""
        where = f"{notebook}, cell {number}"
        tags = cell.metadata.get("tags", [])
        about = {"where": where, "notebook": notebook, "tags": tags}
        if cell.cell_type == "markdown":
            if not (self.code == "none" and "code" in tags):
                cell.metadata = about
                yield cell
        if cell.cell_type != "code" or not cell.source.strip():
            return
        if cell.execution_count is None:
            line = cell.source.strip().split("\n")[0]
            raise Refused(f"{where} was not executed: {line}")
        hidden = self.code == "teach" and "hide-input" in tags
        if self.code != "none":
            source = re.sub(r"\A(# NBVAL_\w+\n)+", "", cell.source)
            kind = "fold" if hidden else "code"
            yield new_code_cell(source.strip("\n"), metadata=about | {
                "kind": kind
            })  # fmt: skip
        after_figure = False
        for output in cell.outputs:
            repeats = output.get("metadata", {}).get("figure_caption")
            if not (after_figure and repeats):
                yield from self.show(output, about)
            after_figure = "figure" in output.get("metadata", {})

    def show(self, output, about):
        """An output in the best form that it has."""
        if output.output_type == "error":
            what = f"{output.ename}: {output.evalue}"
            raise Refused(f"{about['where']} ended in an error: {what}")
        if output.output_type == "stream":
            data = {"text/plain": output.text * (output.name == "stdout")}
        else:
            data = output.data
        picture = next((mime for mime in PICTURES if mime in data), None)
        if WIDGET in data:
            return
        if picture:
            yield self.picture(picture, data[picture], output.metadata, about)
        elif "text/markdown" in data or "text/latex" in data:
            text = data.get("text/markdown") or data["text/latex"]
            yield new_markdown_cell(text, metadata=about)
        else:
            missing = "(an output that only a browser can show)"
            text = strip_ansi(data.get("text/plain", missing)).strip("\n")
            if text:
                about = about | {"kind": "printed"}
                yield new_code_cell(text, metadata=about)

    def picture(self, mime, data, metadata, about):
        """As the notebook has it, or as its vector copy if the notebook's
        digest says that both are of the same run."""
        name = metadata.get("figure", "")
        copy = self.copies / f"{Path(name).name}.svg"
        if name and metadata.get("svg") and copy.is_file():
            vector = copy.read_bytes()
            if digest(vector) == metadata["svg"]:
                mime, data = "image/svg+xml", vector.decode()
        if mime == "image/svg+xml":
            data = base64.b64encode(data.encode()).decode()
        text = "![](attachment:picture)"
        if name:
            about = about | {"kind": "figure", "figure": name}
            about["frames"] = metadata.get("frames", [])
            text += "\n\n" + metadata.get("caption", "")
        held = {"picture": {mime: data}}
        return new_markdown_cell(text, metadata=about, attachments=held)

    def pandoc(self, work, flat, meta, folder):
        """The notebook, laid out, in the language of the writer."""
        (work / "meta.json").write_text(json.dumps(meta))
        run = subprocess.run(
            [pypandoc.get_pandoc_path(), f"--from={READER}", f"--to={self.to}",
             "--standalone", "--columns=10000",
             "--wrap=preserve", "--metadata-file=meta.json",
             f"--lua-filter={HERE / 'filter.lua'}",
             f"--resource-path={os.pathsep.join(map(str, (work, HERE, folder)))}",
             *self.options],
            input=json.dumps(flat), capture_output=True, text=True, cwd=work,
        )  # fmt: skip
        if run.returncode:
            found = re.search(r"REFUSED (.*)", run.stderr)
            raise Refused(found[1] if found else run.stderr.strip())
        return run.stdout

    def finish(self, work, text):
        """What pandoc wrote as a PDF; the same bytes of the same text."""
        source = work / "report.typ"
        source.write_text(text)
        try:
            return typst.compile(
                source, root=work, ignore_system_fonts=True, timestamp=0
            )
        except typst.TypstError as error:
            line = re.search(r"report\.typ:(\d+)", error.diagnostic)
            above = text.split("\n")[: int(line[1]) if line else 0]
            marks = [m[3:] for m in above if m.startswith("// ")]
            where = marks[-1] if marks else "template.typ"
            raise Refused(
                f"{where}: Typst cannot set this: {error.diagnostic}"
            ) from None


class ReportHTMLExporter(ReportExporter):
    """A notebook as one page that needs no other file."""

    export_from_notebook = "Report (HTML)"
    output_mimetype = "text/html"
    to = "html5"
    options = (
        f"--template={HERE / 'template.html'}", "--embed-resources", "--mathml", "--toc",
        "--toc-depth=2", f"--css={HERE / 'style.css'}",
    )  # fmt: skip

    @default("file_extension")
    def _file_extension(self):
        return ".html"

    def finish(self, work, text):
        return text


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]
