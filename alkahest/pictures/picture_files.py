"""Read one picture of a stranger's: only formats that are named, sizes checked, as eight bits of RGB."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alkahest.errors import FileFormatError

if TYPE_CHECKING:
    from PIL.Image import Image

# Ending -> Pillow's formats that a file of it may be in. Pillow tries no other: an EPS would start Ghostscript.
FORMATS = {
    ".png": ("PNG",),
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".jfif": ("JPEG", "MPO"),
    ".webp": ("WEBP",),
    ".bmp": ("BMP", "DIB"),
    ".gif": ("GIF",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".jp2": ("JPEG2000",),
    ".j2k": ("JPEG2000",),
    ".avif": ("AVIF",),
    ".heic": ("HEIF",),
    ".heif": ("HEIF",),
    ".jxl": ("JXL",),
}
_ALL = tuple(dict.fromkeys(name for names in FORMATS.values() for name in names))
MOST_PIXELS = 178_956_970  # Pillow's own limit for what is no bomb
_LARGEST = 4096  # a side that training never needs more of: larger pictures are brought near it while they are read


def read_picture(path: Path, background: str = "white", frame: int = 0) -> tuple[Image, list[str]]:
    """A picture as eight bits of RGB, upright, and what was done to it, in words.

    >>> image, notes = read_picture(Path("a.tiff"), background="grey")

    Transparency is laid on ``background`` (a name or #rrggbb), of an animation ``frame`` is taken, 16 bits are scaled
    to 8, and colours of a profile other than sRGB are brought to it. Raises FileFormatError for what cannot be read.
    """
    from PIL import Image as images

    register_plugins()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", images.DecompressionBombWarning)  # the limit below is ours
            warnings.simplefilter("error", UserWarning)  # of damaged metadata, which Pillow guesses at
            with images.open(io.BytesIO(_bytes_of(path)), formats=_known(_ALL)) as opened:
                return _plain(opened, background, frame)
    except FileFormatError:
        raise
    except Exception as error:  # Pillow and its decoders raise whatever they meet: one damaged picture, told as that
        reader = f"no reader for {path.suffix}: pip install pillow-heif pillow-jxl-plugin"
        lacking = not _known(FORMATS.get(path.suffix.lower(), ()))
        found = reader if lacking else f"{type(error).__name__}: {str(error)[:80]}"
        raise FileFormatError("dataset", f"unreadable: {found}", file=path) from None


def register_plugins() -> None:
    """Have Pillow know the formats of plugins that are installed (the extra ``pictures``)."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of Pillow's formats that are there."""
    from PIL import Image as images

    images.init()
    return tuple(name for name in names if name in images.OPEN)


def _bytes_of(path: Path) -> bytes:
    size = path.stat().st_size
    if size == 0:
        raise FileFormatError("dataset", "empty file", file=path)
    if size > 1 << 30:
        raise FileFormatError("dataset", "larger than 1 GB", file=path)
    return path.read_bytes()


def _plain(opened: Any, background: str, frame: int) -> tuple[Image, list[str]]:
    from PIL import ImageOps

    notes = []
    if opened.width * opened.height > MOST_PIXELS:
        raise FileFormatError("dataset", f"too many pixels: {opened.width} x {opened.height}")
    frames = getattr(opened, "n_frames", 1)
    if frames > 1:
        if frame >= frames:
            raise FileFormatError("dataset", f"an animation of {frames} frames has no frame {frame}")
        opened.seek(frame)
        notes.append(f"frame {frame} of several is taken")
    if opened.format == "JPEG" and max(opened.size) > 2 * _LARGEST:
        opened.draft(opened.mode, (_LARGEST, _LARGEST))  # decoded small: a quarter of the memory or less
    opened.load()
    image = opened
    if (factor := max(image.size) // _LARGEST) > 1:
        image = image.reduce(factor)
        notes.append(f"larger than {_LARGEST} pixels: read at 1/{factor}")
    image, more = _eight_bits(image, opened.info.get("icc_profile"))
    notes += more
    if "A" in image.getbands() or "transparency" in opened.info:
        image = _on(image.convert("RGBA"), background)
        notes.append(f"transparency is laid on {background}")
    upright = ImageOps.exif_transpose(image)
    return upright if upright.mode == "RGB" else upright.convert("RGB"), notes


def _eight_bits(image: Any, profile: bytes | None) -> tuple[Any, list[str]]:
    """Numbers scaled to eight bits, and colours brought to sRGB."""
    import numpy as np
    from PIL import Image as images

    if image.mode.startswith("I;16"):
        wide = np.asarray(image, np.uint16)
        return images.fromarray(np.rint(wide / 257).astype(np.uint8)), ["16 bits are scaled to 8"]
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        if image.mode == "I" and low >= 0 and high <= 65535 and image.format == "PNG":  # a PNG's 16 bits, so opened
            return images.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)), ["16 bits are scaled to 8"]
        raise FileFormatError("dataset", f"numbers of mode {image.mode} have no stated white")
    if profile:
        return _in_srgb(image, profile)
    if image.mode in ("CMYK", "LAB"):
        return image.convert("RGB"), [f"{image.mode} without a profile: converted plainly"]
    return image, []


def _in_srgb(image: Any, profile: bytes) -> tuple[Any, list[str]]:
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileName(source).strip()
        if "srgb" in name.lower() and image.mode not in ("CMYK", "LAB"):
            return image, []
        alpha = image.getchannel("A") if "A" in image.getbands() else None
        plain = image if image.mode in ("CMYK", "LAB", "RGB", "L") else image.convert("RGB")
        found = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise FileFormatError("dataset", f"its colour profile cannot be used: {str(error)[:60]}") from None
    assert found is not None  # it is so in place only
    if alpha is not None:
        found.putalpha(alpha)
    return found, [f"colours of {name[:40]} are brought to sRGB"]


def _on(image: Any, background: str) -> Any:
    """A picture with transparency, laid on a ground."""
    from PIL import Image as images

    ground = images.new("RGBA", image.size, background)
    ground.alpha_composite(image)
    return ground.convert("RGB")
