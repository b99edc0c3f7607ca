"""Exporters for nbconvert: an executed notebook as a PDF and as a page.

    jupyter nbconvert --to report notebooks/02_coupling_math.ipynb

Also in Jupyter's menu, File > Save and Export Notebook As. Python lays a
notebook out as one plain cell for each thing that the reader sees; pandoc
reads these, filter.lua makes figures, links and formulas of them, and Typst
sets the PDF. `python -m report` binds all notebooks into one.
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
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbconvert.utils.exceptions import ConversionException
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from traitlets import Enum, List, Unicode

HERE = Path(__file__).parent
KINDS = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}


class Refused(ConversionException):
    """What the author of a notebook can mend, and where."""


class ReportExporter(Exporter):
    """A notebook as a PDF."""

    export_from_notebook = "Report (PDF)"
    output_mimetype = "application/pdf"
    file_extension = Unicode(".pdf")
    writer = ["--to=typst", f"--template={HERE}/template.typ",
              "--extract-media=.",
              "--syntax-highlighting=idiomatic"]  # fmt: skip
    code = Enum(["teach", "all", "none"], "teach", help="the code to show: "
                "all, none, or what teaches, without cells tagged hide-input "
                "(which the page folds)").tag(config=True)  # fmt: skip
    preprocessors = List([CoalesceStreamsPreprocessor]).tag(config=True)

    def from_notebook_node(self, nb, resources=None, **kw):
        nb, resources = super().from_notebook_node(nb, resources, **kw)
        about = resources.get("metadata", {})
        name = about.get("name") or "notebook"
        folder = Path(about.get("path") or os.curdir).resolve()
        self.copies = Path(os.getenv("FIGURES") or folder / "../figures")
        flat = new_notebook()
        for number, cell in enumerate(nb.cells, 1):
            place = f"{name}.ipynb", number
            book, number = cell.metadata.get("place", place)
            where = f"{book}, cell {number}"
            for part in self.lay_out(cell, where):
                part.metadata |= {"where": where, "notebook": book}
                flat.cells.append(part)
        meta = {"pagetitle": name, "code": self.code}
        meta |= nb.metadata.get("report", {})
        with tempfile.TemporaryDirectory(prefix="report-") as work:
            text = self.pandoc(Path(work), flat, meta, folder)
            return self.finish(Path(work), text), resources

    def lay_out(self, cell, where):
        """One cell for each thing that the reader of the report sees."""
        tags = cell.metadata.get("tags", ())
        if cell.cell_type == "markdown":
            kind = cell.metadata.get("kind")
            cell.metadata = {"kind": kind} if kind else {}
            if self.code != "none" or "about-code" not in tags:
                yield cell
        if cell.cell_type != "code" or not cell.source.strip():
            return
        if cell.execution_count is None:
            raise Refused(f"{where} was not executed:\n{cell.source}")
        hidden = self.code == "teach" and "hide-input" in tags
        if self.code != "none" and not cell.metadata.get("summary"):
            text = re.sub(r"\A(#\s*NBVAL_\w+\n)+", "", cell.source).strip("\n")
            kind = "fold" if hidden else "code"
            yield new_code_cell(text, metadata={"kind": kind})
        figure = None
        for output in cell.outputs:
            about = output.get("metadata", {})
            if not (figure and about.get("figure_caption")):
                yield from self.show(output, about, where)
            figure = about.get("figure")

    def show(self, output, about, where):
        """An output in the best form that it has."""
        if output.output_type == "error":
            what = f"{output.ename}: {output.evalue}"
            raise Refused(f"{where} ended in an error: {what}")
        data = output.get("data", {"text/plain": output.get("text")})
        if output.get("name") == "stderr":
            return
        text = data.get("text/markdown") or data.get("text/latex")
        if any(mime in data for mime in KINDS):
            yield self.picture(data, about)
        elif text:
            yield new_markdown_cell(text)
        elif not any("widget" in mime for mime in data):
            text = data.get("text/plain", "(shown in a browser only)")
            if text := strip_ansi(text).strip("\n"):
                yield new_code_cell(text, metadata={"kind": "printed"})

    def picture(self, data, about):
        """As the notebook has it, or as its vector copy where the digest in
        the notebook says that both are of one run."""
        name = about.get("figure")
        copy = self.copies / f"{name}.svg"
        if about.get("svg") and copy.is_file():
            vector = copy.read_bytes()
            if hashlib.sha256(vector).hexdigest()[:16] == about["svg"]:
                data = {"image/svg+xml": vector.decode()}
        mime = next(mime for mime in KINDS if mime in data)
        data = data[mime]
        if mime == "image/svg+xml":
            data = base64.b64encode(data.encode()).decode()
        file = f"picture.{KINDS[mime]}"
        text = f"![](attachment:{file})\n\n{about.get('caption', '')}"
        cell = new_markdown_cell(text, attachments={file: {mime: data}})
        if name:
            cell.metadata = {"kind": "figure", "figure": name}
            cell.metadata["frames"] = about.get("frames", [])
        return cell

    def pandoc(self, work, flat, meta, folder):
        """The notebook, laid out, as the writer has it."""
        (work / "meta.json").write_text(json.dumps(meta))
        command = [
            pypandoc.get_pandoc_path(), "--from=ipynb-raw_html+smart",
            "--standalone", "--columns=9999", "--wrap=preserve",
            "--metadata-file=meta.json", f"--lua-filter={HERE}/filter.lua",
            f"--resource-path={HERE}{os.pathsep}{folder}", *self.writer,
        ]  # fmt: skip
        run = subprocess.run(command, input=json.dumps(flat), cwd=work,
                             capture_output=True, text=True)  # fmt: skip
        if run.returncode:
            found = re.search(r"REFUSED (.*)", run.stderr)
            raise Refused(found[1] if found else run.stderr)
        return run.stdout

    def finish(self, work, text):
        """A PDF; of the same text the same bytes."""
        path = work / "report.typ"
        path.write_text(text)
        try:
            return typst.compile(path, ignore_system_fonts=True, timestamp=0)
        except typst.TypstError as error:
            line = int(re.search(r"typ:(\d+)", error.diagnostic)[1])
            above = "\n".join(text.split("\n")[:line])
            where = re.findall(r"(?m)^// (.*, cell \d+)$", above)[-1]
            raise Refused(f"{where}: Typst says {error.diagnostic}") from None


class ReportHTMLExporter(ReportExporter):
    """A notebook as one page that needs no other file."""

    export_from_notebook = "Report (HTML)"
    output_mimetype = "text/html"
    file_extension = Unicode(".html")
    writer = ["--to=html5", "--mathml", "--toc", "--toc-depth=2",
              "--embed-resources", "--variable=document-css=true",
              f"--include-after-body={HERE}/page.html",
              "--css=style.css"]  # fmt: skip

    def finish(self, work, text):
        return text
