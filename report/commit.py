"""Configuration of `make notebooks` and `make lab`: notebooks as they are
committed, with nothing of when, where and how fast they ran."""

METADATA = {
    "kernelspec": {
        "display_name": "Python 3", "language": "python", "name": "python3",
    },
    "language_info": {"name": "python"},
}  # fmt: skip


def quiet(notebook, resources):
    """After the run: no progress bars, no warnings, no widgets."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs
                if output.get("name") != "stderr"
                and not any("widget" in kind for kind in output.get("data", ()))
            ]  # fmt: skip
    notebook.metadata = METADATA
    return notebook, resources


def save(model, **_):
    """Jupyter adds the version of Python to what it saves."""
    if model["type"] == "notebook":
        model["content"]["metadata"] = METADATA


c = get_config()  # noqa: F821
c.ContentsManager.pre_save_hook = save
c.ExecutePreprocessor.coalesce_streams = True
c.ClearMetadataPreprocessor.enabled = True
c.ClearMetadataPreprocessor.preserve_cell_metadata_mask = {"tags"}
c.NotebookExporter.preprocessors = [quiet]
