"""Nodes for ComfyUI, which `alkahest nodes install` registers there.

They work on ComfyUI's own MODEL objects by its own contract (clone, key patches, add_patches), so a merge costs
nothing until it is sampled or saved. Z-Image's pad tokens stay those of the first model: ComfyUI patches no
parameter of a module that has others below it, neither for its own nodes nor for ours.
"""

from pathlib import Path

from alkahest.nodes.measuring import AlkahestMultiplier, AlkahestSupplement
from alkahest.nodes.merging import AlkahestAdd, AlkahestMerge, AlkahestSubtract
from alkahest.nodes.saving import AlkahestSave

WEB_DIRECTORY = str(Path(__file__).parent / "web")  # the extension of the editor, which ComfyUI serves
NODE_CLASS_MAPPINGS = {
    "AlkahestMerge": AlkahestMerge,
    "AlkahestSubtract": AlkahestSubtract,
    "AlkahestAdd": AlkahestAdd,
    "AlkahestMultiplier": AlkahestMultiplier,
    "AlkahestSupplement": AlkahestSupplement,
    "AlkahestSave": AlkahestSave,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AlkahestMerge": "Alkahest Merge",
    "AlkahestSubtract": "Alkahest Subtract",
    "AlkahestAdd": "Alkahest Add",
    "AlkahestMultiplier": "Alkahest Multiplier",
    "AlkahestSupplement": "Alkahest Supplement LoRA",
    "AlkahestSave": "Alkahest Recipe Save",
}
