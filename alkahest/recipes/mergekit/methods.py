"""mergekit's merge methods as recipe text, and where the result is another than mergekit's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from alkahest.engine.scalars import text_of
from alkahest.errors import nearest
from alkahest.recipes.mergekit.config import Config, Model
from alkahest.recipes.mergekit.settings import Value, constant, switch_of, value_of, whole_of

_Names = Mapping[str, str]  # path -> name in the recipe
_DRAWN = "{0} draws other random numbers here, and divides what is left by the odds where mergekit restores its L1 norm"
# Method: what it knows as settings of the whole merge, and as settings of a model.
_KNOWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("normalize",), ("weight",)),
    "slerp": (("t",), ()),
    "nuslerp": (("nuslerp_row_wise", "nuslerp_flatten"), ("weight",)),
    "karcher": (("max_iter", "tol"), ()),
    "model_stock": (("filter_wise",), ()),
    "sce": (("int8_mask", "select_topk"), ()),
    "passthrough": ((), ("scale",)),
}
_TASK = ("int8_mask", "normalize", "rescale", "lambda")
# Method: how it thins deltas, whether it elects signs, whether it normalises unless told.
_ARITHMETIC: dict[str, tuple[str, bool, bool]] = {
    "task_arithmetic": ("", False, False),
    "ties": ("magnitude", True, True),
    "dare_ties": ("dare", True, False),
    "dare_linear": ("dare", False, False),
    "breadcrumbs": ("breadcrumbs", False, False),
    "breadcrumbs_ties": ("breadcrumbs", True, False),
    "della": ("della", True, True),
    "della_linear": ("della", False, False),
}
_EXTRA = {"breadcrumbs": ("gamma",), "della": ("epsilon",)}


def text_of_config(config: Config, names: _Names) -> str:
    """The recipe text that does what a config says; what differs goes to its notes. RecipeError if there is none."""
    makers: dict[str, Callable[[Config, _Names], str]] = {
        "linear": _linear,
        "slerp": _slerp,
        "nuslerp": _nuslerp,
        "karcher": _karcher,
        "model_stock": _model_stock,
        "sce": _sce,
        "passthrough": _passthrough,
        **dict.fromkeys(_ARITHMETIC, _arithmetic),
    }
    make = makers.get(config.method)
    if make is None:
        raise config.refusal(
            f"Alkahest has no merge method {config.method!r}",
            found=", ".join(makers),
            fix=nearest(config.method, makers),
        )
    _require_settings(config)
    return make(config, names)


def _require_settings(config: Config) -> None:
    """Refuse settings that the method does not have, which mergekit passes over."""
    whole, each = _KNOWN.get(config.method, (_TASK, ("weight", "density")))
    if config.method in _ARITHMETIC:
        each += _EXTRA.get(_ARITHMETIC[config.method][0], ())
    for scope, known in ((config.parameters, (*whole, *each)), *((one.parameters, each) for one in config.models)):
        for name in scope:
            if name not in known:
                problem = f"{config.method} has no such parameter" + (" for a model" if name in whole else "")
                raise config.refusal(problem, found=name, fix=nearest(str(name), known))
    if config.parameters.get("int8_mask") is not None:
        config.notes.append("int8_mask says in what mergekit keeps masks: nothing to do here")


def _weights(config: Config, models: list[Model], name: str = "weight", default: float | None = None) -> list[Value]:
    return [value_of(config, name, (model.parameters, config.parameters), default) for model in models]


def _require_base(config: Config, others: int = 1) -> Model:
    if config.base is None:
        raise config.refusal(f"{config.method} needs a base_model", fix="base_model: FILE")
    if len(config.others) < others:
        raise config.refusal(f"{config.method} needs {others} models besides its base", found=len(config.others))
    _note_unused(config, config.base)
    return config.base


def _note_unused(config: Config, base: Model) -> None:
    if base.parameters:
        named = ", ".join(map(str, base.parameters))
        config.notes.append(f"{named} of the base is not used, in mergekit neither: it adds differences to the base")


def _linear(config: Config, names: _Names) -> str:
    models, weights = list(config.models), _weights(config, list(config.models))
    listed = f"[{', '.join(names[one.path] for one in models)}], [{', '.join(one.text for one in weights)}]"
    return f"weighted_sum({listed}{', normalise=1' if switch_of(config, 'normalize', True) else ''})"


def _slerp(config: Config, names: _Names) -> str:
    base = _require_base(config)
    if len(config.others) != 1:
        raise config.refusal("slerp goes from the base to one model", found=f"{len(config.others)} models")
    t = value_of(config, "t", (config.parameters,), None)
    return f"slerp({names[base.path]}, {names[config.others[0].path]}, t={t.text})"


def _nuslerp(config: Config, names: _Names) -> str:
    if len(config.others) != 2:
        raise config.refusal("nuslerp goes between two models", found=f"{len(config.others)} besides the base")
    t, flatten = _share_of_second(config), switch_of(config, "nuslerp_flatten", True)
    if not flatten and switch_of(config, "nuslerp_row_wise", False):
        raise config.refusal("nuslerp along columns is not one of ours", fix="nuslerp_row_wise: false")
    first, second = (names[one.path] for one in config.others)
    config.notes.append("what points nearly the same way is mixed linearly here; mergekit stays on the arc")
    if flatten and switch_of(config, "nuslerp_row_wise", False):
        config.notes.append("nuslerp_row_wise is not used, in mergekit neither, unless nuslerp_flatten is false")
    if config.base is not None:
        _note_unused(config, config.base)
        base = names[config.base.path]
        rows = "" if flatten else ", rows=1"
        return f"{base} + nuslerp({first} - {base}, {second} - {base}, t={t.text}{rows})"
    if not flatten:
        raise config.refusal(
            "nuslerp by rows goes between differences", fix="base_model: FILE, or nuslerp_flatten: true"
        )
    return f"slerp({first}, {second}, t={t.text})"


def _share_of_second(config: Config) -> Value:
    """``w2 / (w1 + w2)``, where that is a number or a straight way between numbers."""
    one, two = _weights(config, config.others)
    if [text for text, _ in one.entries] == [text for text, _ in two.entries]:
        entries, totals = [], set()
        for (text, left), (_, right) in zip(one.entries, two.entries, strict=True):
            if len(left) != len(right):
                break
            sums = {round(a + b, 9) for a, b in zip(left, right, strict=True)}
            totals |= {len(sums)}
            entries.append(
                (text, tuple(b / (a + b) if abs(a + b) >= 1e-6 else 0.5 for a, b in zip(left, right, strict=True)))
            )
        if totals == {1} and len(entries) == len(one.entries):
            return Value(tuple(entries))
    found = f"{one.text} and {two.text}"
    raise config.refusal(
        "these weights make a share that no gradient says", found=found, fix="weights that add up to 1"
    )


def _karcher(config: Config, names: _Names) -> str:
    if "tol" in config.parameters:
        config.notes.append("tol is not used: here it is 1e-6")
    iterations = whole_of(config, "max_iter", 10)
    return f"karcher([{', '.join(names[one.path] for one in config.models)}], iterations={iterations})"


def _deltas(config: Config, names: _Names) -> tuple[str, list[str]]:
    base = names[_require_base(config).path]
    return base, [f"{names[one.path]} - {base}" for one in config.others]


def _model_stock(config: Config, names: _Names) -> str:
    _require_base(config, 2)
    if switch_of(config, "filter_wise", False):
        raise config.refusal("model_stock by rows is not one of ours", fix="filter_wise: false")
    config.notes.append("where the differences oppose each other the base stays; mergekit goes the other way there")
    base, deltas = _deltas(config, names)
    return f"{base} + model_stock([{', '.join(deltas)}])"


def _sce(config: Config, names: _Names) -> str:
    base, deltas = _deltas(config, names)
    top = value_of(config, "select_topk", (config.parameters,), 1.0)
    config.notes.append(
        "weights are shares of the squares at any size; mergekit takes equal ones where the mean squares add up to "
        "less than 1e-6, as for differences of 1e-4"
    )
    return f"{base} + sce([{', '.join(deltas)}], top={top.text}, normalise=1)"


def _passthrough(config: Config, names: _Names) -> str:
    if len(config.models) != 1 or config.models[0].parameters or config.parameters:
        raise config.refusal("passthrough is read for one model as it is", found=f"{len(config.models)} models")
    return names[config.models[0].path]


def _arithmetic(config: Config, names: _Names) -> str:
    """Task arithmetic and its kin: thin each difference, weigh it, elect signs or not, divide or not."""
    thinning, elects, normalises = _ARITHMETIC[config.method]
    base, deltas = _deltas(config, names)
    weights = _weights(config, config.others)
    normalise = switch_of(config, "normalize", normalises)
    length = value_of(config, "lambda", (config.parameters,), 1.0)
    if thinning not in ("", "magnitude"):
        deltas = [
            _thinned(config, thinning, *one) for one in zip(deltas, config.others, range(len(deltas)), strict=True)
        ]
    elif not thinning and any("density" in scope for scope in _scopes(config)):
        config.notes.append(f"density is not used, in mergekit neither: {config.method} leaves nothing out")
    if thinning in ("", "magnitude") and switch_of(config, "rescale", False):
        raise config.refusal(
            "rescale restores the L1 norm of a difference, which is not one of ours", fix="rescale: false"
        )
    if elects:
        densities = _weights(config, config.others, "density", 1.0) if thinning == "magnitude" else [constant(1.0)]
        alone = len(densities) == 1 and densities[0].plain is not None  # a list would be read as one for each delta
        density = densities[0].text if alone else f"[{', '.join(one.text for one in densities)}]"
        listed = ", ".join(one.text for one in weights)
        merged = f"ties([{', '.join(deltas)}], density={density}, weights=[{listed}], normalise={int(normalise)})"
    else:
        merged = _weighted(config, base, names, deltas, weights, normalise, bool(thinning))
    if length.plain is None:
        return f"{base} + ({merged}).scaled({length.factors})"
    return f"{base} + {merged}" if length.plain == 1 else f"{base} + {text_of(length.plain)} * ({merged})"


def _scopes(config: Config) -> list[Mapping[str, Any]]:
    return [config.parameters, *(one.parameters for one in config.models)]


def _weighted(
    config: Config, base: str, names: _Names, deltas: list[str], weights: list[Value], normalise: bool, thinned: bool
) -> str:
    """A sum of differences, each times its weight; divided by the weights' sum if asked for."""
    numbers = [one.plain for one in weights]
    if normalise and None in numbers:
        if thinned:
            found = ", ".join(one.text for one in weights)
            raise config.refusal(
                "these weights differ by tensor and are to be divided by their sum", found=found, fix="normalize: false"
            )
        models = ", ".join(names[one.path] for one in config.others)
        return f"(weighted_sum([{models}], [{', '.join(one.text for one in weights)}], normalise=1) - {base})"
    total = sum(one for one in numbers if one is not None)
    if normalise and abs(total) >= 1e-8:
        weights = [one.mapped(lambda number: number / total) for one in weights]
    return " + ".join(
        f"{text_of(one.plain)} * ({delta})" if one.plain is not None else f"({delta}).scaled({one.factors})"
        for delta, one in zip(deltas, weights, strict=True)
    )


def _thinned(config: Config, thinning: str, delta: str, model: Model, number: int) -> str:
    """A difference with entries left out; one whose density is 1 as it is."""
    scopes = (model.parameters, config.parameters)
    density = value_of(config, "density", scopes, 1.0)
    if max(density.numbers) > 1:
        raise config.refusal("density is a share", found=density.text, fix="at most 1")
    if density.plain == 1:
        return delta
    if min(density.numbers) <= 0:
        raise config.refusal(
            "a density of 0 leaves nothing of a model", found=density.text, fix="leave the model out there: weight: 0"
        )
    rescale = switch_of(config, "rescale", thinning != "breadcrumbs")
    drop = density.mapped(lambda kept: round(1 - kept, 12))
    if thinning == "dare":
        if number == 0:
            config.notes.append(_DRAWN.format("dare"))
        made = f"dare({delta}, drop={drop.text}, seed={number + 1})"
        return made if rescale else f"({made}).scaled({density.factors})"
    if thinning == "della":
        return _della(config, delta, value_of(config, "epsilon", scopes, 0.15), drop, rescale, number)
    if rescale:
        raise config.refusal(
            "rescale restores the L1 norm of a difference, which is not one of ours", fix="rescale: false"
        )
    return _breadcrumbs(config, delta, value_of(config, "gamma", scopes, 0.01), density)


def _della(config: Config, delta: str, epsilon: Value, drop: Value, rescale: bool, number: int) -> str:
    if not rescale:
        raise config.refusal("della divides what is left by its odds", found="rescale: false", fix="rescale: true")
    if number == 0:
        config.notes.append(_DRAWN.format("della"))
    window = epsilon.mapped(lambda share: 2 * share)
    return f"della({delta}, drop={drop.text}, window={window.text}, seed={number + 1})"


def _breadcrumbs(config: Config, delta: str, gamma: Value, density: Value) -> str:
    largest = gamma.plain
    if largest is None:
        raise config.refusal("gamma is read as one number", found=gamma.text)
    smallest = density.mapped(lambda kept: round(1 - kept - largest, 12))
    if min(smallest.numbers) < 0:
        if density.plain is None:
            found = f"density {density.text}, gamma {gamma.text}"
            raise config.refusal("density and gamma together are more than 1 somewhere", found=found)
        smallest, gamma = constant(0.0), constant(round(1 - density.plain, 12))
        config.notes.append(f"to keep a density of {density.text} outliers go up to {gamma.text}, as in mergekit")
    return f"breadcrumbs({delta}, smallest={smallest.text}, largest={gamma.text})"
