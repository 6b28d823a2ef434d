"""Every public function shows its own options, refuses others by name, and names itself."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import alkahest as ak
from alkahest.engine.options import Options
from alkahest.errors import OutputError, UnknownNameError, UnsupportedError, refuse_unknown_options
from alkahest.lab import panels, plots, run_plots

# Names that are a caller's own: named scalars, controls of a widget, settings of a merge method.
FREE = {"bind", "set", "sweep", "stream_sweep", "explore", "_repr_mimebundle_", "text_lines", "as_it_is", "build"}


def public_functions() -> Iterator[tuple[str, Any]]:
    """Functions of the public surface, and methods of its classes."""
    for name in ak.__all__:
        one = getattr(ak, name)
        if inspect.isclass(one):
            yield from (
                (f"{name}.{n}", m) for n, m in vars(one).items() if inspect.isfunction(m) and not n.startswith("_")
            )
        elif callable(one):
            yield name, one


def modules() -> Iterator[Any]:
    for found in pkgutil.walk_packages(ak.__path__, "alkahest."):
        if not found.name.startswith(("alkahest.cli", "alkahest.__main__", "alkahest.finetune")):
            yield importlib.import_module(found.name)


def test_no_function_hides_its_options() -> None:
    hidden = {
        f"{module.__name__}.{name}"
        for module in modules()
        for name, one in inspect.getmembers(module, inspect.isfunction)
        if one.__module__ == module.__name__ and name not in FREE and not name.startswith("_")
        for parameter in inspect.signature(one).parameters.values()
        if parameter.kind is parameter.VAR_KEYWORD
    }
    methods = {
        name
        for name in vars(ak.Weights)
        if "**" in str(inspect.signature(getattr(ak.Weights, name)) if callable(getattr(ak.Weights, name)) else "")
    }
    assert not hidden | methods


def test_every_parameter_of_the_public_surface_has_a_type() -> None:
    untyped = [
        f"{name}({parameter.name})"
        for name, one in public_functions()
        for parameter in inspect.signature(one).parameters.values()
        if parameter.name != "self" and parameter.annotation is parameter.empty
    ]
    assert not untyped


PAIRS = [
    ("alkahest.measure.table", "delta_table"),
    ("alkahest.measure.spectrum", "delta_spectra"),
    ("alkahest.measure.pairs", "compare"),
    ("alkahest.measure.lineage", "refiner_check"),
    ("alkahest.measure.lineage", "nearest_base"),
    ("alkahest.pictures.needed", "needed_multiplier"),
    ("alkahest.lora.extract", "extract_lora"),
    ("alkahest.pictures.sweeps", "sweep"),
    ("alkahest.training.loop", "finetune"),
]


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_a_function_and_its_generator_take_the_same(module: str, name: str) -> None:
    found = importlib.import_module(module)
    one, stream = (inspect.signature(getattr(found, which)) for which in (name, f"stream_{name}"))
    assert one.parameters == stream.parameters
    assert getattr(ak, name) is getattr(found, name)


def test_saving_and_streaming_take_the_same() -> None:
    assert inspect.signature(ak.Weights.save).parameters == inspect.signature(ak.Weights.stream).parameters
    assert {*inspect.signature(ak.Weights.save).parameters} - {"self", "path", "executor"} == {
        *Options.__dataclass_fields__
    }


@pytest.fixture
def models(trio: dict[str, Path]) -> dict[str, Any]:
    return {name: ak.open(path) for name, path in trio.items()}


CALLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "delta_table": lambda m: ak.delta_table(m["variant"] - m["base"], layout="diffusers"),
    "delta_spectra": lambda m: ak.delta_spectra(m["variant"] - m["base"], rounding="stochastic"),
    "compare": lambda m: ak.compare({"a": m["variant"] - m["base"], "b": m["bridge"] - m["base"]}, dtype="bf16"),
    "needed_multiplier": lambda m: ak.needed_multiplier(m["variant"] - m["base"], on=m["bridge"], baisis="survival"),
    "refiner_check": lambda m: ak.refiner_check(m["variant"], m["base"], seed=3),
    "nearest_base": lambda m: ak.nearest_base(m["variant"], [m["base"]], layout="native"),
    "extract_lora": lambda m: ak.extract_lora(m["variant"] - m["base"], comfy_compatible=True),
    "load_into": lambda m: m["base"].load_into(None, metadata={}),
    "save": lambda m: m["base"].save("never.safetensors", dtpye="bf16"),
    "stream": lambda m: m["base"].stream("never.safetensors", batch=4),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_means_nothing_here_is_refused_by_the_function_s_own_name(name: str, models: dict[str, Any]) -> None:
    with pytest.raises(UnknownNameError, match=f"^{name}: unknown option"):
        CALLS[name](models)
    assert not Path("never.safetensors").exists()


def test_the_nearest_name_is_offered(models: dict[str, Any]) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'basis'"):
        CALLS["needed_multiplier"](models)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"threads": 0}, OutputError), ({"threads": 1.5}, OutputError), ({"device": "tpu9"}, UnsupportedError)],
)
def test_a_wrong_value_is_told_by_the_function_s_own_name(
    options: dict[str, Any], error: type[Exception], models: dict[str, Any]
) -> None:
    delta = models["variant"] - models["base"]
    for function in (ak.delta_table, ak.delta_spectra, ak.extract_lora):
        with pytest.raises(error, match=f"^{function.__name__}: "):
            function(delta, **options)


def test_a_function_that_takes_any_name_is_not_decorated() -> None:
    def any_name(**given: int) -> None: ...

    with pytest.raises(TypeError, match="takes any name"):
        refuse_unknown_options(any_name)


def test_tab_offers_what_is_there_to_be_used() -> None:
    assert "extract_lora" in dir(ak)
    for module in (plots, panels, run_plots, ak.mini):
        assert dir(module) == sorted(module.__all__)
        for name in dir(module):
            assert not name.startswith("_")
            assert getattr(module, name).__class__.__name__ != "module", name


def test_keys_of_a_checkpoint_complete_and_it_is_a_mapping(models: dict[str, Any]) -> None:
    base = models["base"]
    assert next(key for key in base._ipython_key_completions_() if key.startswith("lay")).startswith("layers.0.")
    assert base.part("layers.1")._ipython_key_completions_() == list(base.part("layers.1"))
    key, value = next(iter(base.items()))
    assert (key in base, base.get(key).shape, base.get("nothing", 3)) == (True, value.shape, 3)
    assert base.keys() & models["variant"].keys() == set(base)
    assert len(list(base.values())) == len(base)
    with pytest.raises(KeyError, match="no such tensor"):
        base["nothing"]


# Called by recipes, which name themselves; or of a name that a caller chooses.
BY_OTHERS = {"apply_lora", "lerp", "made_up", "method", "param", "sweep", "weighted_sum"}


@pytest.mark.parametrize("name", sorted(set(ak.__all__) - BY_OTHERS - {"mini"}))
def test_every_public_function_names_itself_to_an_option_that_it_does_not_have(name: str) -> None:
    one = getattr(ak, name)
    if inspect.isclass(one) and name != "LiveModel":
        return  # a kind of value, which functions make
    with pytest.raises(UnknownNameError, match=f"^{name}: unknown (option|setting)"):
        one(stepz=3)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ak.extract_lora(delta, ra", {"rank=", "rank_max=", "ratio="}),
        ("ak.delta_table(delta, exa", {"exact="}),
        ("base.save('x', dty", {"dtype="}),
        ("ak.sweep(live, 'a', {}, see", {"seeds="}),
        ("ak.dare(delta, dro", {"drop="}),
        ("plots.line", {"lineage_comparison"}),
        ("base['x_pad", {"x_pad_token"}),
    ],
)
def test_tab_in_a_notebook_offers_them(typed: str, offered: set[str], models: dict[str, Any]) -> None:
    from IPython.core.completer import IPCompleter, provisionalcompleter

    delta = models["variant"] - models["base"]
    space = {"ak": ak, "plots": plots, "base": models["base"], "delta": delta}
    completer = IPCompleter(namespace=space, global_namespace=space)
    with provisionalcompleter():
        found = {one.text for one in completer.completions(typed, len(typed))}
    assert offered <= found


@pytest.mark.parametrize("value", [1, "yes", None, []])
def test_yes_or_no_is_a_bool(value: Any) -> None:
    for name in ("comfy_compatible", "allow_nonfinite"):
        with pytest.raises(OutputError, match=rf"(?s){name} is yes or no.*True or False"):
            Options.of({name: value})
