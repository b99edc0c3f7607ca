"""Exporters for nbconvert: an executed notebook as a PDF and as a page.

    jupyter nbconvert --to report notebooks/02_coupling_math.ipynb

Python lays a notebook out as one plain cell for each thing that the reader
sees; pandoc reads these, filter.lua makes figures, links and formulas of
them, and Typst sets the PDF. `python -m report` binds all notebooks into one.
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
from nbconvert.utils.exceptions import ConversionException as Refused
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from traitlets import Enum, List, Unicode

HERE = Path(__file__).parent
KINDS = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}
PANDOC = [
    pypandoc.get_pandoc_path(), "--from=ipynb-raw_html+smart", "--standalone",
    "--columns=9999", "--wrap=preserve", "--metadata-file=meta.json",
    f"--lua-filter={HERE}/filter.lua",
]  # fmt: skip


class ReportExporter(Exporter):
    """A notebook as a PDF."""

    export_from_notebook = "Report (PDF)"
    output_mimetype = "application/pdf"
    file_extension = Unicode(".pdf")
    preprocessors = List([CoalesceStreamsPreprocessor]).tag(config=True)
    code = Enum(["teach", "all", "none"], "teach").tag(config=True)
    writer = [
        "--to=typst", f"--template={HERE}/template.typ",
        "--extract-media=.", "--syntax-highlighting=idiomatic",
    ]  # fmt: skip

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
            (Path(work) / "meta.json").write_text(json.dumps(meta))
            path = f"--resource-path={HERE}{os.pathsep}{folder}"
            run = subprocess.run(
                [*PANDOC, path, *self.writer], input=json.dumps(flat),
                cwd=work, capture_output=True, text=True,
            )  # fmt: skip
            if run.returncode:
                found = re.search(r"REFUSED (.*)", run.stderr)
                raise Refused(found[1] if found else run.stderr)
            return self.finish(Path(work), run.stdout), resources

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
        if self.code != "none" and not cell.metadata.get("summary"):
            text = re.sub(r"\A(#\s*NBVAL_\w+\n)+", "", cell.source).strip("\n")
            hidden = self.code == "teach" and "hide-input" in tags
            kind = "fold" if hidden else "code"
            yield new_code_cell(text, metadata={"kind": kind})
        for output in cell.outputs:
            about = output.get("metadata", {})
            if output.output_type == "error":
                what = f"{output.ename}: {output.evalue}"
                raise Refused(f"{where} ended in an error: {what}")
            if not about.get("figure_caption"):
                yield from self.show(output, about)

    def show(self, output, about):
        """An output in the best form that it has."""
        data = output.get("data", {"text/plain": output.get("text")})
        text = data.get("text/markdown", data.get("text/latex"))
        if any(mime in data for mime in KINDS):
            yield self.picture(data, about)
        elif text:  # an interval, 0.1 [0.0, 0.2], is not broken
            interval = r"(?<=\d) \[([-.\w]+), ([-.\w]+\])"
            text = re.sub(interval, "\xa0[\\1,\xa0\\2", text)
            yield new_markdown_cell(text)
        elif output.get("name") != "stderr" and "widget" not in str([*data]):
            text = data.get("text/plain", "(shown in a browser only)")
            if text := strip_ansi(text).strip("\n"):
                yield new_code_cell(text, metadata={"kind": "printed"})

    def picture(self, data, about):
        """As the notebook has it, or as its vector copy where the digest in
        the notebook says that both are of one run."""
        name = about.get("figure")
        copy = self.copies / f"{name}.svg"
        vector = copy.read_bytes() if copy.is_file() else b""
        if hashlib.sha256(vector).hexdigest()[:16] == about.get("svg"):
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
    writer = [
        "--to=html5", "--mathml", "--toc", "--toc-depth=2", "--css=style.css",
        "--embed-resources", "--variable=document-css=true",
        f"--include-after-body={HERE}/page.html",
    ]  # fmt: skip

    def finish(self, work, text):
        return text
