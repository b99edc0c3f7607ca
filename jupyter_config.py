"""For `make notebooks` and `make lab`: a notebook as it is committed, with
nothing of when, where and how fast it ran."""

from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelspec import get_kernel_dict
from jupyter_server.services.contents.largefilemanager import (
    AsyncLargeFileManager,
)
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
ABOUT = {"kernelspec": KERNEL, "language_info": {"name": "python"}}


def quiet(notebook, resources=None):
    """A notebook without progress bars, warnings and live widgets, in which
    a cell is folded where the report folds it."""
    for cell in notebook["cells"]:
        cell["metadata"].pop("jupyter", None)
        if "hide-input" in cell["metadata"].get("tags", ()):
            cell["metadata"]["jupyter"] = {"source_hidden": True}
        if cell["cell_type"] == "code":
            cell["outputs"] = [
                out for out in cell["outputs"]
                if out.get("name") != "stderr"
                and not any("widget" in mime for mime in out.get("data", ()))
            ]  # fmt: skip
    notebook["metadata"] = ABOUT
    return notebook, resources


def save(model, **_):
    """Jupyter would keep them, and the version of Python."""
    if model["type"] == "notebook":
        quiet(model["content"])


class Manager(AsyncLargeFileManager):
    """Files, where a notebook says on opening what JupyterLab would write
    into it else: that alone would mark it as changed."""

    async def get(self, *args, **options):
        model = await super().get(*args, **options)
        if model["type"] == "notebook" and model["content"]:
            spec = {"display_name": get_kernel_dict()["display_name"]}
            model["content"]["metadata"] |= {
                "kernelspec": KERNEL | spec,
                "language_info": IPythonKernel.language_info,
            }
        return model


c = get_config()  # noqa: F821
c.ServerApp.contents_manager_class = Manager
c.ContentsManager.pre_save_hook = save
c.ClearMetadataPreprocessor.enabled = True
c.ClearMetadataPreprocessor.preserve_cell_metadata_mask = {"tags", "jupyter"}
c.NotebookExporter.preprocessors = [quiet, CoalesceStreamsPreprocessor]
