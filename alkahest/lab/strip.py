"""Pictures as PNG bytes, one or several side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP, _LEAST = 4, 192  # pixels; smaller pictures are enlarged


def strip(images: Sequence[Image]) -> bytes:
    """Pictures side by side as a PNG file, small ones enlarged."""
    from PIL import Image

    scale = max(1, -(-_LEAST // images[0].width))
    enlarged = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in images]
    width = sum(one.width + _GAP for one in enlarged) - _GAP
    whole = Image.new("RGB", (width, max(one.height for one in enlarged)), "white")
    left = 0
    for one in enlarged:
        whole.paste(one, (left, 0))
        left += one.width + _GAP
    return png_bytes(whole)


def png_bytes(image: Image) -> bytes:
    """One picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
