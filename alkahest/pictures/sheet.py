"""A table of pictures -> one labelled picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    from PIL.Image import Image

_GAP, _FONT = 4, 13


def side_by_side(images: Sequence[Image]) -> Image:
    """Pictures in a row, transparent between and below them."""
    from PIL import Image

    row = Image.new("RGBA", (sum(one.width + _GAP for one in images) - _GAP, max(one.height for one in images)))
    left = 0
    for one in images:
        row.paste(one, (left, 0))
        left += one.width + _GAP
    return row


def row_of_pictures(images: Sequence[Image], size: int = 96, most: int = 8) -> Image | None:
    """The last of some pictures side by side, small; None for none."""
    shown = [image.convert("RGB").resize((round(image.width * size / image.height), size)) for image in images[-most:]]
    return side_by_side(shown) if shown else None


def contact_sheet(
    table: pandas.DataFrame, rows: Sequence[str], columns: Sequence[str], size: int | None = None, title: str = ""
) -> Image:
    """The pictures of ``table.path`` (files or images) in a grid, one row and column for each combination of values.

    ``size`` is the width of one picture in pixels, by default its own, enlarged to at least 128. Cells
    without a picture are grey and say why.
    """
    from PIL import Image, ImageDraw, ImageFont

    down = _combinations(table, rows)
    across = _combinations(table, columns)
    pictures = {
        (_key(row, rows), _key(row, columns)): (row["path"], row.get("error")) for row in table.to_dict("records")
    }
    native = next((_open(path).size for path, _ in pictures.values() if is_picture(path)), (128, 128))
    width = size or max(1, -(-128 // native[0])) * native[0]
    height = round(width * native[1] / native[0])
    font = ImageFont.load_default(_FONT)
    margin = max([*(font.getlength(line) for key in down for line in _label(rows, key)), 0]) + 3 * _GAP
    top = (len(columns) + (2 if title else 0)) * (_FONT + 4) + 2 * _GAP
    lines_down = max(1, len(rows)) * (_FONT + 4)
    step = max(height, lines_down) + _GAP
    sheet = Image.new("RGB", (int(margin) + len(across) * (width + _GAP), top + len(down) * step), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((_GAP, _GAP), title, "black", font)
    for x, column in enumerate(across):
        left = int(margin) + x * (width + _GAP)
        for n, line in enumerate(_label(columns, column)):
            pen.text((left, top - (len(columns) - n) * (_FONT + 4) - _GAP), _fit(line, width, font), "black", font)
        for y, row in enumerate(down):
            corner = (left, top + y * step)
            path, error = pictures.get((row, column), (None, "not drawn"))
            if is_picture(path):
                filter_ = Image.Resampling.NEAREST if width >= native[0] else Image.Resampling.LANCZOS
                sheet.paste(_open(path).resize((width, height), filter_), corner)
            else:
                pen.rectangle((*corner, left + width, corner[1] + height), "lightgrey")
                pen.text((left + _GAP, corner[1] + _GAP), _fit(str(error), width, font), "black", font)
    for y, row in enumerate(down):
        for n, line in enumerate(_label(rows, row)):
            pen.text((_GAP, top + y * step + n * (_FONT + 4)), line, "black", font)
    return sheet


def png_bytes(image: Image, optimize: bool = False) -> bytes:
    """One picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=optimize)
    return buffer.getvalue()


def is_picture(path: Any) -> bool:
    """Whether a cell has one; a failed one holds None, or what pandas makes of it."""
    return isinstance(path, str) or hasattr(path, "mode")


def _open(path: Any) -> Image:
    from PIL import Image

    if not isinstance(path, str):
        return path  # type: ignore[no-any-return]
    with Image.open(path) as image:
        return image.convert("RGB")


def _key(row: dict[Any, Any], names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


def _combinations(table: pandas.DataFrame, names: Sequence[str]) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(_key(row, names) for row in table.to_dict("records")))


def _label(names: Sequence[str], values: tuple[Any, ...]) -> list[str]:
    return [
        str(v) if n in ("prompt", "model") else f"{n} = {v:g}" if isinstance(v, float) else f"{n} = {v or 'none'}"
        for n, v in zip(names, values, strict=True)
    ]


def _fit(text: str, width: int, font: Any) -> str:
    while len(text) > 4 and font.getlength(text) > width:
        text = text[:-4] + "..."
    return text
