"""Scenes -> pictures of 64 x 64 pixels, by signed distances: smooth edges, no files, no fonts.

Three styles of one scene: ``photo`` (shading, cast shadow, haze), ``anime`` (flat colour, dark
outline, two tones) and ``sketch`` (outlines and pale fill on paper).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from alkahest.mini.scenes import Scene

SIZE = 64
Array = npt.NDArray[Any]
Part = tuple[Array, Array]  # signed distance in pixels, RGB

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + np.float32(0.5)
_RGB = {
    "red": (0.90, 0.13, 0.13),
    "green": (0.10, 0.68, 0.20),
    "blue": (0.13, 0.28, 0.95),
    "yellow": (0.98, 0.86, 0.10),
    "purple": (0.62, 0.16, 0.80),
    "white": (0.97, 0.97, 0.97),
    "cyan": (0.05, 0.85, 0.90),
}
_SKY = {  # top, bottom
    "day": ((0.30, 0.58, 0.95), (0.80, 0.91, 1.00)),
    "sunset": ((0.42, 0.27, 0.55), (1.00, 0.62, 0.25)),
    "night": ((0.02, 0.03, 0.14), (0.10, 0.13, 0.32)),
}
_LIGHT_ON_PLACE = {"day": (1.0, 1.0, 1.0), "sunset": (0.95, 0.68, 0.52), "night": (0.26, 0.30, 0.50)}
_LIGHT_ON_SUBJECT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.84, 0.72), "night": (0.68, 0.72, 0.88)}
_SKIN, _HAIR, _DARK, _BARK = (0.93, 0.74, 0.60), (0.30, 0.17, 0.08), (0.18, 0.18, 0.24), (0.42, 0.27, 0.14)
_INK = np.array((0.07, 0.05, 0.09), np.float32)
_PAPER = np.array((0.95, 0.93, 0.88), np.float32)


def draw(scene: Scene) -> Array:
    """The picture of a scene: float32 [64, 64, 3], RGB in 0 to 1, the same for the same scene.

    >>> draw(Scene("ball", "red", "meadow", "night", "left")).shape
    (64, 64, 3)
    """
    rng = np.random.default_rng([scene.seed, 0])
    horizon = 34 + rng.uniform(-3, 3)
    middle = {"left": 15.0, "middle": 32.0, "right": 49.0}[scene.side] + rng.uniform(-3, 3)
    size = 11.5 * rng.uniform(0.88, 1.14)
    foot = 57 + rng.uniform(-3, 2)
    tint = 1 + rng.uniform(-0.06, 0.06, 3).astype(np.float32)

    canvas = _sky(scene, horizon, rng)
    light = np.array(_LIGHT_ON_PLACE[scene.light], np.float32)
    for distance, colour in _PLACE[scene.place](horizon, rng):
        _paint_background(canvas, distance, colour * light * tint, scene.style)
    subject = _SUBJECT[scene.subject](middle, foot, size, np.array(_RGB[scene.colour], np.float32))
    _paint_subject(canvas, subject, scene, middle, foot, size)
    if scene.quality == "low":
        canvas = 0.5 + 0.8 * (_blur(canvas, 1.6) - 0.5)
    return np.clip(canvas, 0, 1)


def _paint(canvas: Array, distance: Array, colour: Array, opacity: float = 1.0) -> None:
    # Edges take a pixel and a half, as a lens would draw them; sharper ones cost the autoencoder dearly.
    cover = opacity * np.clip(0.5 - distance / 1.5, 0, 1)[..., None]
    canvas += cover * (colour - canvas)


def _line(canvas: Array, distance: Array, width: float, opacity: float = 1.0) -> None:
    _paint(canvas, np.abs(distance) - width, _INK, opacity)


def _paint_background(canvas: Array, distance: Array, colour: Array, style: str) -> None:
    if style == "photo":  # lighter toward the horizon, as haze does
        depth = np.clip((_Y - 24) / 40, 0, 1)[..., None]
        _paint(canvas, distance, colour * (1.12 - 0.35 * depth))
    elif style == "anime":
        _paint(canvas, distance, np.clip(colour * 1.15, 0, 1))
        _line(canvas, distance, 0.4, 0.5)
    else:
        _paint(canvas, distance, _PAPER + 0.35 * (colour - _PAPER))
        _line(canvas, distance, 0.4, 0.4)


def _paint_subject(canvas: Array, parts: list[Part], scene: Scene, x: float, foot: float, size: float) -> None:
    light = np.array(_LIGHT_ON_SUBJECT[scene.light], np.float32)
    slope = ((_X - x) * 0.55 + (_Y - foot + size) * 0.6) / size  # grows away from a light at the upper left
    if scene.style == "photo":
        shadow = _ellipse(x + 3, foot + 0.5, size * 1.05, size * 0.24)
        canvas *= 1 - 0.45 * np.clip(0.5 - shadow / 3, 0, 1)[..., None]
    for distance, colour in parts:
        lit = colour * light
        if scene.style == "photo":
            edge = np.clip(1 + distance / 6, 0, 1)
            shade = np.clip(1.02 - 0.22 * slope - 0.25 * edge**2, 0.5, 1.1)[..., None]
            glint = 0.35 * np.exp(-((_X - x + 0.35 * size) ** 2 + (_Y - foot + 1.45 * size) ** 2) / 10)[..., None]
            _paint(canvas, distance, np.clip(lit * shade + glint * light, 0, 1))
        elif scene.style == "anime":
            _paint(canvas, distance, np.where((slope > 0.35)[..., None], lit * 0.78, lit))
            _line(canvas, distance, 0.75)
        else:
            _paint(canvas, distance, _PAPER + 0.6 * (lit - _PAPER))
            _line(canvas, distance, 0.55)


def _sky(scene: Scene, horizon: float, rng: np.random.Generator) -> Array:
    top, bottom = (np.array(c, np.float32) for c in _SKY[scene.light])
    down = np.clip(_Y / horizon, 0, 1)[..., None]
    if scene.style != "photo":
        down = np.floor(down * 2.99) / 2  # flat bands
    canvas = (top + down * (bottom - top)).astype(np.float32)
    if scene.style == "sketch":
        canvas = _PAPER + 0.35 * (canvas - _PAPER)
    x = 54 + rng.uniform(-4, 4) if scene.side != "right" else 10 + rng.uniform(-4, 4)
    if scene.light == "day":
        sun = _circle(x, 9, 4.5)
        if scene.style == "photo":
            canvas += 0.3 * np.exp(-np.clip(sun, 0, None) / 6)[..., None]
        _paint(canvas, sun, np.array((1.0, 0.97, 0.75), np.float32))
    elif scene.light == "sunset":
        sun = _circle(x, horizon - 5, 8)
        if scene.style == "photo":
            canvas += np.array((0.35, 0.2, 0.05), np.float32) * np.exp(-np.clip(sun, 0, None) / 8)[..., None]
        _paint(canvas, sun, np.array((1.0, 0.82, 0.30), np.float32))
    else:
        _paint(canvas, np.maximum(_circle(x, 10, 6), -_circle(x + 3, 8, 5)), np.array((0.95, 0.93, 0.80), np.float32))
    return np.clip(canvas, 0, 1)


def _blur(canvas: Array, sigma: float) -> Array:
    steps = np.arange(-4, 5)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        padded = np.pad(canvas, [(4, 4) if a == axis else (0, 0) for a in range(3)], mode="edge")
        shifted = (np.take(padded, np.arange(k, k + SIZE), axis) for k in range(len(weights)))
        canvas = sum(np.float32(w) * one for w, one in zip(weights, shifted, strict=True))  # type: ignore[assignment]
    return canvas


# --- signed distances, negative inside, in pixels ---------------------------------------------


def _circle(x: float, y: float, r: float) -> Array:
    return np.hypot(_X - x, _Y - y) - r


def _ellipse(x: float, y: float, rx: float, ry: float) -> Array:
    return (np.hypot((_X - x) / rx, (_Y - y) / ry) - 1) * min(rx, ry)


def _box(x: float, y: float, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(_X - x) - half_width, np.abs(_Y - y) - half_height)


def _triangle(x: float, top: float, bottom: float, half_width: float) -> Array:
    height = bottom - top
    slant = (np.abs(_X - x) * height - (_Y - top) * half_width) / np.hypot(height, half_width)
    return np.maximum(slant, _Y - bottom)


def _star(x: float, y: float, r: float) -> Array:
    angle = np.mod(np.arctan2(_X - x, y - _Y) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5
    along, across = np.hypot(_X - x, _Y - y) * np.cos(angle), np.abs(np.hypot(_X - x, _Y - y) * np.sin(angle))
    inner = 0.42 * r
    tip_x, dent_x, dent_y = r, inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5)
    length = np.hypot(tip_x - dent_x, dent_y)
    return ((along - tip_x) * dent_y + across * (tip_x - dent_x)) / length


def _heart(x: float, y: float, r: float) -> Array:
    u, v = np.abs(_X - x), y - _Y
    lobe = np.hypot(u - 0.48 * r, v - 0.30 * r) - 0.55 * r
    point = np.maximum((u * 0.75 - (v + 0.95 * r) * 0.66), v - 0.35 * r)
    return np.minimum(lobe, point)


# --- subjects: x of the middle, y of the foot, half height, colour -> parts, back to front ------------


def _rgb(colour: tuple[float, float, float]) -> Array:
    return np.array(colour, np.float32)


def _cone(x: float, foot: float, s: float, c: Array) -> list[Part]:
    return [(_triangle(x, foot - 2.1 * s, foot, 1.0 * s), c)]


def _tree(x: float, foot: float, s: float, c: Array) -> list[Part]:
    crown = np.minimum(_circle(x, foot - 1.65 * s, 0.75 * s), _circle(x - 0.5 * s, foot - 1.25 * s, 0.55 * s))
    crown = np.minimum(crown, _circle(x + 0.5 * s, foot - 1.25 * s, 0.55 * s))
    return [(_box(x, foot - 0.4 * s, 0.17 * s, 0.45 * s), _rgb(_BARK)), (crown, c)]


def _house(x: float, foot: float, s: float, c: Array) -> list[Part]:
    return [
        (_box(x, foot - 0.6 * s, 0.9 * s, 0.6 * s), c),
        (_triangle(x, foot - 2.1 * s, foot - 1.1 * s, 1.15 * s), _rgb(_DARK) * 1.6),
        (_box(x, foot - 0.35 * s, 0.22 * s, 0.36 * s), _rgb(_DARK)),
    ]


def _man(x: float, foot: float, s: float, c: Array) -> list[Part]:
    legs = np.minimum(
        _box(x - 0.25 * s, foot - 0.45 * s, 0.17 * s, 0.45 * s), _box(x + 0.25 * s, foot - 0.45 * s, 0.17 * s, 0.45 * s)
    )
    shirt = np.minimum(_box(x, foot - 1.25 * s, 0.42 * s, 0.42 * s), _box(x, foot - 1.5 * s, 0.75 * s, 0.16 * s))
    return [
        (legs, _rgb(_DARK)),
        (shirt, c),
        (_circle(x, foot - 2.05 * s, 0.38 * s), _rgb(_SKIN)),
        (np.maximum(_circle(x, foot - 2.1 * s, 0.42 * s), _Y - (foot - 2.15 * s)), _rgb(_HAIR)),
    ]


def _woman(x: float, foot: float, s: float, c: Array) -> list[Part]:
    legs = np.minimum(
        _box(x - 0.22 * s, foot - 0.2 * s, 0.11 * s, 0.22 * s), _box(x + 0.22 * s, foot - 0.2 * s, 0.11 * s, 0.22 * s)
    )
    return [
        (np.minimum(_circle(x, foot - 2.05 * s, 0.52 * s), _box(x, foot - 1.7 * s, 0.52 * s, 0.4 * s)), _rgb(_HAIR)),
        (legs, _rgb(_SKIN)),
        (_triangle(x, foot - 2.0 * s, foot - 0.4 * s, 0.95 * s), c),
        (_circle(x, foot - 2.0 * s, 0.36 * s), _rgb(_SKIN)),
    ]


_SUBJECT: dict[str, Callable[[float, float, float, Array], list[Part]]] = {
    "ball": lambda x, foot, s, c: [(_circle(x, foot - s, s), c)],
    "box": lambda x, foot, s, c: [(_box(x, foot - 0.85 * s, 0.88 * s, 0.85 * s), c)],
    "cone": _cone,
    "star": lambda x, foot, s, c: [(_star(x, foot - 1.1 * s, 1.25 * s), c)],
    "ring": lambda x, foot, s, c: [(np.abs(_circle(x, foot - s, 0.8 * s)) - 0.24 * s, c)],
    "tree": _tree,
    "house": _house,
    "man": _man,
    "woman": _woman,
    "heart": lambda x, foot, s, c: [(_heart(x, foot - 1.0 * s, 1.1 * s), c)],
}


# --- places: horizon, rng -> parts, back to front; colours as by day ---------------------------


def _ground(horizon: float) -> Array:
    return horizon - _Y


def _meadow(horizon: float, rng: np.random.Generator) -> list[Part]:
    hill = horizon - 3 + 3 * np.sin((_X + rng.uniform(0, 64)) / 9) - _Y
    return [(hill, _rgb((0.42, 0.62, 0.38))), (_ground(horizon + 4), _rgb((0.58, 0.80, 0.40)))]


def _beach(horizon: float, rng: np.random.Generator) -> list[Part]:
    shore = horizon + 11 + 1.5 * np.sin((_X + rng.uniform(0, 64)) / 7) - _Y
    return [(_ground(horizon), _rgb((0.16, 0.50, 0.68))), (shore, _rgb((0.93, 0.84, 0.62)))]


def _mountains(horizon: float, rng: np.random.Generator) -> list[Part]:
    peaks: list[Part] = []
    for x, height in zip((10.0, 34.0, 56.0), rng.uniform(20, 27, 3), strict=True):
        x += rng.uniform(-5, 5)
        rock = _triangle(x, horizon + 2 - height, horizon + 2, 18)
        peaks += [
            (rock, _rgb((0.45, 0.43, 0.50))),
            (np.maximum(rock, _Y - (horizon + 10 - height)), _rgb((0.95, 0.96, 1.0))),
        ]
    return [*peaks, (_ground(horizon), _rgb((0.72, 0.78, 0.84)))]


def _city(horizon: float, rng: np.random.Generator) -> list[Part]:
    parts: list[Part] = []
    for x, height in zip((5, 18, 31, 45, 58), rng.uniform(12, 26, 5), strict=True):
        grey = rng.uniform(0.45, 0.65)
        parts.append((_box(x, horizon - height / 2, 5.2, height / 2), _rgb((grey, grey * 0.93, grey * 0.95))))
    return [*parts, (_ground(horizon), _rgb((0.50, 0.50, 0.53)))]


def _forest(horizon: float, rng: np.random.Generator) -> list[Part]:
    firs: list[Part] = []
    for x in (2.0, 13.0, 24.0, 36.0, 48.0, 60.0):
        x += rng.uniform(-3, 3)
        firs.append((_triangle(x, horizon - rng.uniform(20, 27), horizon + 2, 8), _rgb((0.10, 0.32, 0.22))))
    return [*firs, (_ground(horizon), _rgb((0.44, 0.36, 0.24)))]


def _desert(horizon: float, rng: np.random.Generator) -> list[Part]:
    dune = horizon - 2 + 4 * np.sin((_X + rng.uniform(0, 64)) / 11) - _Y
    cactus = np.minimum(_box(9, horizon - 5, 1.6, 9), _box(12, horizon - 5, 4, 1.4))
    return [
        (dune, _rgb((0.85, 0.52, 0.28))),
        (cactus, _rgb((0.20, 0.45, 0.25))),
        (_ground(horizon + 5), _rgb((0.93, 0.64, 0.36))),
    ]


_PLACE: dict[str, Callable[[float, Any], list[Part]]] = {
    "meadow": _meadow,
    "beach": _beach,
    "mountains": _mountains,
    "city": _city,
    "forest": _forest,
    "desert": _desert,
}
