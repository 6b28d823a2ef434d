"""The article's own workflow: two imports into the bridge, merged with each other, drawn with and saved.

One is of ComfyUI's core nodes and one of Alkahest's, which keep the bridge's refiner. They lie beside this module in
``example_workflows``, where ComfyUI looks for a node pack's templates. The numbers are to be replaced: 10 is where
ModelMergeSubtract stops.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alkahest.workflow.editor_form import to_editor

FOLDER = Path(__file__).parent / "example_workflows"
MULTIPLIER = 10.0
_FILES = {  # title of a loader, and the file in diffusion_models that it names
    "the bridge: ALKAHEST": "alkahest.safetensors",
    "a Turbo derivative": "turbo_derivative.safetensors",
    "what it was trained from: De-Turbo": "z_image_de_turbo_bf16.safetensors",
    "a Base derivative": "base_derivative.safetensors",
    "what it was trained from: Base": "z_image_bf16.safetensors",
}
_NOTE = """Two models brought over to the bridge, and merged with each other

1. Choose your five files in the loaders on the left. Each derivative is paired with what *it* was trained from.
2. {how}
3. Queue. {saved}

No single multiplier fits all: Alkahest Multiplier computes one from the three models, and says how sure it is.
Z-Image from a bridge is near to Base: 20 to 50 steps and a guidance of 3 to 5, or a distill LoRA and fewer."""
_CORE_NOTE = (
    "ModelMergeSubtract multiplies a difference by at most 10. ComfyUI's own nodes add it to the refiner too, which "
    "the bridge wants to keep: the other workflow does."
)
_OURS_NOTE = "Alkahest Merge multiplies a difference by any number, and keeps the bridge's refiner."


def workflows() -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the editor's form of every example."""
    for name, (graph, how, saved) in {
        "merge_two_imports_core": (two_imports(ours=False), _CORE_NOTE, "The merge is saved, and drawn with."),
        "merge_two_imports_alkahest": (
            two_imports(ours=True),
            _OURS_NOTE,
            "The merge is drawn with, and saved with its recipe: `alkahest recipe FILE`.",
        ),
    }.items():
        yield name, _with_note(to_editor(graph), _NOTE.format(how=how, saved=saved))


def two_imports(ours: bool) -> dict[str, Any]:
    """The graph in the API form, of Alkahest's nodes or of core ones."""
    graph: dict[str, Any] = {}

    def node(kind: str, title: str = "", **inputs: Any) -> list[Any]:
        name = str(len(graph) + 1)
        graph[name] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}
        return [name, 0]

    bridge, *pairs = (
        node("UNETLoader", title, unet_name=file, weight_dtype="default") for title, file in _FILES.items()
    )
    imported = []
    for title, (variant, base) in {"import of Turbo": pairs[:2], "import of Base": pairs[2:]}.items():
        if ours:
            three = {"bridge": bridge, "variant": variant, "base": base}
            imported.append(node("AlkahestMerge", title, **three, multiplier=MULTIPLIER, protect="refiner", parts=""))
        else:
            delta = node("ModelMergeSubtract", model1=variant, model2=base, multiplier=MULTIPLIER)
            imported.append(node("ModelMergeAdd", title, model1=bridge, model2=delta))
    merged = node("ModelMergeSimple", "both imports", model1=imported[0], model2=imported[1], ratio=0.5)
    node("AlkahestSave" if ours else "ModelSave", model=merged, filename_prefix="diffusion_models/two_imports")
    _draw(node, merged)
    return graph


def _draw(node: Any, model: list[Any]) -> None:
    """The nodes that draw with a model as Z-Image Base is drawn with."""
    clip = node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2", device="default")
    vae = node("VAELoader", vae_name="ae.safetensors")
    shifted = node("ModelSamplingAuraFlow", model=model, shift=3.0)
    prompt = node("CLIPTextEncode", "prompt", clip=clip, text="a lighthouse on a rock at dusk, oil on canvas")
    negative = node("CLIPTextEncode", "negative prompt", clip=clip, text="blurry, low quality")
    latent = node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    sampled = node(
        "KSampler",
        model=shifted,
        positive=prompt,
        negative=negative,
        latent_image=latent,
        seed=1,
        steps=30,
        cfg=4.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    picture = node("VAEDecode", samples=sampled, vae=vae)
    node("SaveImage", images=picture, filename_prefix="two_imports")


def _with_note(workflow: dict[str, Any], text: str) -> dict[str, Any]:
    """The same with a note above it, which the editor shows and sends to nobody."""
    height = 260
    for node in workflow["nodes"]:
        node["pos"][1] += height + 40
    number = workflow["last_node_id"] + 1
    note = {
        "id": number,
        "type": "MarkdownNote",
        "pos": [60, 40],
        "size": [740, height],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "how to use this",
        "properties": {},
        "widgets_values": [text],
    }
    return {**workflow, "last_node_id": number, "nodes": [*workflow["nodes"], note]}


def write_examples() -> None:
    """Write them anew, after a change of this module."""
    FOLDER.mkdir(exist_ok=True)
    for name, workflow in workflows():
        (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_examples()
