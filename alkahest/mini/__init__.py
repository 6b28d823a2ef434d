"""The miniature family: real Z-Image models small enough to ship, whose lineages do not mix.

>>> base, turbo = ak.mini.load("base"), ak.mini.load("turbo")
>>> ak.sample(ak.pipeline(base), "a red ball on the left of a meadow at night", cfg=3).images[0]

Made by ``alkahest mini build``; README.md beside this file says what they can do, with numbers.
"""

from alkahest.mini.members import load, lora, prompts, save_pipeline
from alkahest.mini.shipped import FAMILY, LORAS, WEIGHTS, components, family, is_miniature, loras, manifest

__all__ = [
    "FAMILY",
    "LORAS",
    "WEIGHTS",
    "components",
    "family",
    "is_miniature",
    "load",
    "lora",
    "loras",
    "manifest",
    "prompts",
    "save_pipeline",
]


def __dir__() -> list[str]:
    return __all__
