"""The ComfyUI node that saves: block by block to disk, with the recipe in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alkahest.errors import AlkahestError
from alkahest.nodes.measuring import _require_pandas, with_progress
from alkahest.nodes.merging import CATEGORY, NOTED


class AlkahestSave:
    """Saves a model without holding the merged one: from its files where the graph can be read, else as it is."""

    def __init__(self) -> None:
        import folder_paths

        self.output_dir = folder_paths.get_output_directory()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "filename_prefix": ("STRING", {"default": "diffusion_models/alkahest"})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO", "unique_id": "UNIQUE_ID"},
        }

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "save"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = "Save a merged model block by block. Where the graph can be read as a recipe the file is computed from the models' files, in float32, and carries the recipe with their hashes: `alkahest recipe FILE`. Else ComfyUI's model is written tensor by tensor. The names are bare native ones, which UNETLoader reads."  # fmt: skip

    def save(self, model: Any, filename_prefix: str, prompt: Any = None, extra_pnginfo: Any = None, unique_id: str = "") -> dict[str, Any]:  # fmt: skip
        _require_pandas("Alkahest Recipe Save")
        import folder_paths
        from comfy.cli_args import args

        folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, self.output_dir)
        path = Path(folder) / f"{name}_{counter:05}_.safetensors"
        metadata = {} if args.disable_metadata else {"prompt": prompt, **(extra_pnginfo or {})}
        texts = {key: json.dumps(value) for key, value in metadata.items() if value is not None}
        try:
            weights, options, said = _from_files(prompt, unique_id, model)
        except AlkahestError as error:
            from alkahest.nodes.model import ModelWeights

            weights, options = ModelWeights(model, "model"), {"layout": "native"}
            said = f"no recipe, because:\n{error}"
        saved = with_progress(weights.stream(path, metadata=texts, **options))
        report = f"{saved!r}\n{said}"
        return {"ui": {"text": [report]}, "result": (report,)}


def _from_files(prompt: Any, node: str, model: Any) -> tuple[Any, dict[str, Any], str]:
    """The expression behind this node, of the files that ComfyUI's loaders name, and how to write it."""
    from alkahest.provenance import build, output_for
    from alkahest.workflow.graph import read_graph
    from alkahest.workflow.translate import recipes_of

    (recipe,) = recipes_of(read_graph(with_used(prompt, model)), node=str(node))
    weights = build(recipe, {name: _path(file.folder, file.name) for name, file in recipe.files.items()})
    notes = "".join(f"\nnote: {note}" for note in recipe.notes)
    return weights, output_for(recipe, weights), f"recipe: {weights.text()}{notes}"


def with_used(prompt: Any, model: Any) -> Any:
    """The graph with the multipliers that our nodes used in place of links to nodes that computed them."""
    used = model.attachments.get(NOTED) or {}
    copied = json.loads(json.dumps(prompt))
    for node, multiplier in used.items():
        if isinstance(copied, dict) and isinstance(copied.get(node), dict):
            copied[node].setdefault("inputs", {})["multiplier"] = multiplier
    return copied


def _path(folder: str, name: str) -> str:
    import folder_paths

    return str(folder_paths.get_full_path_or_raise(folder, name))
