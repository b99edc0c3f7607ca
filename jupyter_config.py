"""For `make notebooks` and `make lab`: a notebook as it is committed, with
nothing of when, where and how fast it ran."""

from nbconvert.preprocessors import CoalesceStreamsPreprocessor

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
ABOUT = {"kernelspec": KERNEL, "language_info": {"name": "python"}}


def quiet(notebook, resources):
    """After a run: no progress bars, no warnings."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                out for out in cell.outputs
                if out.get("name") != "stderr"
                and not any("widget" in mime for mime in out.get("data", ()))
            ]  # fmt: skip
    notebook.metadata = ABOUT
    return notebook, resources


def save(model, **_):
    """Jupyter would add the version of Python to what it saves."""
    if model["type"] == "notebook":
        model["content"]["metadata"] = ABOUT


c = get_config()  # noqa: F821
c.ContentsManager.pre_save_hook = save
c.ClearMetadataPreprocessor.enabled = True
c.ClearMetadataPreprocessor.preserve_cell_metadata_mask = {"tags"}
c.NotebookExporter.preprocessors = [quiet, CoalesceStreamsPreprocessor]
