"""Pictures as people have them, against numbers worked out by hand; what cannot be read is one picture, told by name."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from alkahest.errors import FileFormatError
from alkahest.pictures.picture_files import FORMATS, read_picture


def pixels(path: Path, **options: Any) -> np.ndarray:
    image, _ = read_picture(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    gradient = np.linspace(0, 65535, 256 * 256).reshape(256, 256).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(gradient).save(tmp_path / name)
        found, notes = read_picture(tmp_path / name)
        assert np.asarray(found).mean() == pytest.approx(127.5, abs=0.6)
        assert np.array_equal(np.asarray(found)[..., 0], np.rint(gradient / 257).astype(np.uint8))
        assert notes == ["16 bits are scaled to 8"]
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(FileFormatError, match="no stated white"):
        read_picture(tmp_path / "f.tif")


def test_transparency_is_laid_on_a_ground(tmp_path: Path) -> None:
    values = np.zeros((2, 2, 4), np.uint8)
    values[0, 0] = (200, 0, 0, 255)
    values[0, 1] = (200, 0, 0, 127)
    values[1] = (7, 7, 7, 0)  # colours that nobody was meant to see
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[1, 0].tolist() == [255, 255, 255]
    grey = pixels(tmp_path / "a.png", background="#808080")
    assert grey[0, 0].tolist() == [200, 0, 0]
    assert grey[1, 1].tolist() == [128, 128, 128]
    assert abs(int(grey[0, 1, 0]) - round(200 * 127 / 255 + 128 * 128 / 255)) <= 1
    palette = Image.fromarray(values[..., :3]).convert("P")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 1)))
    assert pixels(tmp_path / "p.png")[1, 1].tolist() == [255, 255, 255]


def press_profile(cyan: tuple[int, int, int]) -> bytes:
    """An ICC profile of CMYK with this colour of CIE Lab for cyan, a black for black, and white for all else."""
    black, white = (0, 128, 128), (255, 128, 128)
    table = b"".join(bytes(black if n & 1 else cyan if n & 8 else white) for n in range(16))  # cyan varies slowest
    unit = struct.pack(">9i", *(value << 16 for value in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    steps = bytes(range(256))
    daylight = struct.pack(">3i", 63190, 65536, 54061)  # D50
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 6) + b"press\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + daylight,
        b"A2B0": b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + unit + 4 * steps + table + 3 * steps,
    }
    start, entries, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        entries += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kind = struct.pack(">4sI4s4s4s", b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head = struct.pack(">I", start + len(body)) + kind + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    return (head + daylight).ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + body


def test_cmyk_goes_by_its_profile(tmp_path: Path) -> None:
    colour = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    colour.save(tmp_path / "plain.jpg", quality=100)
    _, notes = read_picture(tmp_path / "plain.jpg")
    assert notes == ["CMYK without a profile: converted plainly"]
    # A press whose cyan is a red: by the formulas of CIE Lab and sRGB its full ink is (186, 89, 88).
    colour.save(tmp_path / "press.tif", icc_profile=press_profile((128, 128 + 40, 128 + 20)))
    found, notes = read_picture(tmp_path / "press.tif")
    assert "are brought to sRGB" in notes[0]
    assert np.abs(np.asarray(found)[0, 0].astype(int) - (186, 89, 88)).max() <= 2
    space = ImageCms.createProfile("LAB")
    lab = Image.new("LAB", (8, 8), (128, 128, 128))
    lab.save(tmp_path / "lab.tif", icc_profile=ImageCms.ImageCmsProfile(space).tobytes())
    found, notes = read_picture(tmp_path / "lab.tif")
    assert "are brought to sRGB" in notes[0]
    assert np.ptp(np.asarray(found)[0, 0]) <= 4  # a and b of 128 are no colour
    Image.new("RGB", (8, 8), (9, 99, 199)).save(tmp_path / "bad.png", icc_profile=b"no profile at all")
    with pytest.raises(FileFormatError, match="colour profile cannot be used"):
        read_picture(tmp_path / "bad.png")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (8, 8), (9, 99, 199)).save(tmp_path / "srgb.png", icc_profile=srgb)
    assert pixels(tmp_path / "srgb.png")[0, 0].tolist() == [9, 99, 199]


def test_animations_take_a_stated_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        found, notes = read_picture(tmp_path / name)
        assert np.asarray(found)[4, 4].tolist() == [255, 0, 0]
        assert "frame 0 of several is taken" in notes
        assert pixels(tmp_path / name, frame=2)[4, 4].tolist() == [0, 0, 255]
        with pytest.raises(FileFormatError, match="an animation of 3 frames has no frame 3"):
            read_picture(tmp_path / name, frame=3)


@pytest.mark.parametrize("suffix", [one for one in FORMATS if one not in (".j2k", ".heif")])
def test_every_format_that_is_named(suffix: str, tmp_path: Path) -> None:
    from alkahest.pictures.picture_files import register_plugins

    register_plugins()
    image = Image.fromarray(np.linspace(40, 200, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8))
    names = {".jfif": "JPEG", ".heic": "HEIF", ".jxl": "JXL", ".avif": "AVIF", ".jp2": "JPEG2000", ".tif": "TIFF"}
    if names.get(suffix, "PNG") not in Image.SAVE and suffix in (".heic", ".jxl", ".avif", ".jp2"):
        pytest.skip(f"nothing here writes {suffix}")
    image.save(tmp_path / f"a{suffix}", format=names.get(suffix))
    assert np.abs(pixels(tmp_path / f"a{suffix}").astype(int) - np.asarray(image)).mean() < 6


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    found = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        found += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return found


def test_what_cannot_be_read_is_told_of_one_picture(tmp_path: Path) -> None:
    size = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = png([(b"IHDR", size), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")])
    small = io.BytesIO()
    Image.new("RGB", (32, 32)).save(small, "BMP")
    corrupt = bytearray(small.getvalue())
    corrupt[14:18] = struct.pack("<I", 0xFFFFFFFF)
    text = png(
        [
            (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)),
            (b"zTXt", b"a\0\0" + zlib.compress(b"x" * 300_000_000, 9)),
            (b"IDAT", zlib.compress(b"\0" * (8 * 25))),
            (b"IEND", b""),
        ]
    )
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/tmp/owned) (w) file\n"
    cases = {"bomb.png": bomb, "corrupt.bmp": bytes(corrupt), "text.png": text, "eps.png": eps, "empty.png": b""}
    cases |= {"noise.jpg": bytes(range(256)) * 8, "cut.png": bomb[:40], "psd.png": b"8BPS\0\1" + bytes(40)}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FileFormatError, match=r"unreadable|too many pixels|empty file") as told:
            read_picture(tmp_path / name)
        assert name in str(told.value) or "too many pixels" in str(told.value)
    assert not Path("/tmp/owned").exists()


def test_a_large_picture_costs_no_gigabytes(tmp_path: Path) -> None:
    """12,000 x 12,000: decoded once, and no second copy of that size."""
    program = (
        "import sys; from pathlib import Path; from PIL import Image\n"
        "from alkahest.pictures.picture_files import read_picture\n"
        "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "before = peak()\n"
        "image, notes = read_picture(Path(sys.argv[1]))\n"
        "print(image.size, peak() - before)\n"
    )
    Image.new("RGB", (12000, 12000), (40, 90, 140)).save(tmp_path / "large.png", compress_level=1)
    Image.new("RGB", (12000, 12000), (40, 90, 140)).save(tmp_path / "large.jpg")
    for name in ("large.png", "large.jpg"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / name)], capture_output=True, text=True, check=True
        )
        size, _, used = done.stdout.strip().rpartition(" ")
        assert size == "(6000, 6000)"
        assert int(used) < 1_200_000, "kilobytes"
