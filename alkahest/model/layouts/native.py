"""The original layout, which ComfyUI reads and writes: fused qkv, short names.

Source: Tongyi-MAI's single files and ComfyUI's ``comfy/ldm/lumina/model.py`` (NextDiT).
"""

from __future__ import annotations

import re

from alkahest.model.layouts.layout import Layout

_QKV = re.compile(r"(.+)\.attention\.qkv\.weight")
_TO_CANONICAL = [
    (re.compile(r"^x_embedder\."), "all_x_embedder.2-1."),
    (re.compile(r"^final_layer\."), "all_final_layer.2-1."),
    (re.compile(r"\.attention\.out\."), ".attention.to_out.0."),
    (re.compile(r"\.attention\.([qk])_norm\."), r".attention.norm_\1."),
]
_TO_STORED = [
    (re.compile(r"^all_x_embedder\.2-1\."), "x_embedder."),
    (re.compile(r"^all_final_layer\.2-1\."), "final_layer."),
    (re.compile(r"\.attention\.to_out\.0\."), ".attention.out."),
    (re.compile(r"\.attention\.norm_([qk])\."), r".attention.\1_norm."),
    (re.compile(r"\.attention\.to_[qkv]\."), ".attention.qkv."),
]


def canonical(stored: str) -> tuple[str, ...]:
    if fused := _QKV.fullmatch(stored):
        return tuple(f"{fused[1]}.attention.to_{which}.weight" for which in "qkv")
    for pattern, replacement in _TO_CANONICAL:
        stored = pattern.sub(replacement, stored)
    return (stored,)


def stored(key: str) -> str:
    for pattern, replacement in _TO_STORED:
        key = pattern.sub(replacement, key)
    return key


LAYOUT = Layout("native", canonical, stored)
