"""Execute the notebooks: for the tests, and as a command to store their outputs (`make notebooks`)."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def executed(path: Path, folder: Path) -> NotebookNode:
    """The notebook run from top to bottom in ``folder``, with fresh outputs."""
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # two at a time on two cores, and no fight over them
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=120,
        store_widget_state=False,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute()
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = joined(cell.outputs)
    return notebook


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Printed text arrives in as many pieces as chance has it, and bars that were taken away leave an empty output; one
    cell's text is one output.
    """
    result: list[NotebookNode] = []
    for output in outputs:
        if output.get("data") == {}:
            continue
        if result and output.output_type == "stream" and result[-1].get("name") == output.name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


if __name__ == "__main__":
    for path in NOTEBOOKS:
        notebook = executed(path, FOLDER)
        notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
        nbformat.write(notebook, path)
        print(f"refreshed {path.name}")
