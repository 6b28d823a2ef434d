"""The ComfyUI node that saves: block by block to disk, with the recipe in the file."""

from __future__ import annotations

import json
from typing import Any

from alkahest.errors import AlkahestError
from alkahest.nodes.graph_files import left_beside, path_of, with_used
from alkahest.nodes.running import SavingNode, report_of, require_packages, with_progress


class AlkahestSave(SavingNode):
    """Saves a model without holding the merged one: from its files where the graph can be read, else as it is."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "filename_prefix": ("STRING", {"default": "diffusion_models/alkahest"})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO", "unique_id": "UNIQUE_ID"},
        }

    FUNCTION = "save"
    DESCRIPTION = (
        "Save a merged model block by block. Where the graph can be read as a recipe the file is computed from the "
        "models' files, in float32, and carries the recipe with their hashes: `alkahest recipe FILE`. Else "
        "ComfyUI's model is written tensor by tensor. The names are bare native ones, which UNETLoader reads."
    )

    def save(
        self, model: Any, filename_prefix: str, prompt: Any = None, extra_pnginfo: Any = None, unique_id: str = ""
    ) -> dict[str, Any]:
        require_packages("Alkahest Recipe Save")
        from comfy.cli_args import args

        path = self.path(filename_prefix)
        metadata = {} if args.disable_metadata else {"prompt": prompt, **(extra_pnginfo or {})}
        texts = {key: json.dumps(value) for key, value in metadata.items() if value is not None}
        try:
            weights, options, said = _from_files(prompt, unique_id, model)
        except AlkahestError as error:
            from alkahest.nodes.model import ModelWeights

            weights, options = ModelWeights(model, "model"), {"layout": "native"}
            said = "\n".join([f"no recipe, because:\n{error}", *left_beside(prompt, unique_id)])
        saved = with_progress(weights.stream(path, metadata=texts, **options))
        return report_of(f"{saved!r}\n{said}")


def _from_files(prompt: Any, node: str, model: Any) -> tuple[Any, dict[str, Any], str]:
    """The expression behind this node, of the files that ComfyUI's loaders name, and how to write it."""
    from alkahest.recipes.inputs import build, output_for
    from alkahest.workflow.graph import read_graph
    from alkahest.workflow.translate import recipes_of

    (recipe,) = recipes_of(read_graph(with_used(prompt, model)), node=str(node))
    weights = build(recipe, {name: path_of(file.folder, file.name) for name, file in recipe.files.items()})
    notes = "".join(f"\nnote: {note}" for note in recipe.notes)
    return weights, output_for(recipe, weights), f"recipe: {weights.text()}{notes}"
