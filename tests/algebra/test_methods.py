from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import alkahest as ak
from alkahest.algebra import methods
from alkahest.engine.evaluate import evaluate
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.errors import AlgebraError, UnknownNameError
from alkahest.model import seeded
from alkahest.recipes.text import _FUNCTIONS, parse

KEY = "layers.1.feed_forward.w3.weight"


@pytest.fixture(scope="module")
def models(trio: dict[str, Path]) -> list[ak.Checkpoint]:
    return [ak.open(trio[name]) for name in ("bridge", "variant", "base")]


@pytest.fixture
def registry() -> Iterator[None]:
    """What a test registers is forgotten."""
    before = dict(methods.REGISTRY)
    yield
    methods.REGISTRY.clear()
    methods.REGISTRY.update(before)


def computed(expression: ak.Weights | ak.Delta, key: str = KEY) -> torch.Tensor:
    found = expression.at(key, Rules())
    assert found is not None
    out = torch.empty(expression.shapes[key]).view(-1)
    evaluate(found, 0, out.numel(), out, Workspace(torch.device("cpu")))
    return out


def flat(model: ak.Checkpoint) -> torch.Tensor:
    return model[KEY].double().view(-1)


def test_ties_against_the_paper(models: list[ak.Checkpoint]) -> None:
    """Algorithm 1 of arXiv:2306.01708, entry by entry in float64."""
    a, v, b = models
    deltas = [flat(v) - flat(b), flat(a) - flat(b), flat(a) - flat(v)]
    trimmed = []
    for delta in deltas:
        keep = round(0.3 * len(delta))
        order = delta.abs().argsort(descending=True, stable=True)
        kept = torch.zeros_like(delta)
        kept[order[:keep]] = delta[order[:keep]]
        threshold = delta.abs()[order[keep - 1]]
        kept[delta.abs() == threshold] = delta[delta.abs() == threshold]  # bf16 has many equal entries
        trimmed.append(kept)
    elected = sum(trimmed).sign()
    expected = torch.zeros_like(deltas[0])
    for i in range(len(expected)):
        agreeing = [t[i] for t in trimmed if t[i] != 0 and t[i].sign() == elected[i]]
        expected[i] = sum(agreeing) / len(agreeing) if agreeing else 0
    ours = computed(ak.ties([v - b, a - b, a - v], density=0.3))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-8)
    assert 0 < (ours == 0).double().mean() < 1


def test_dare_against_the_paper(models: list[ak.Checkpoint]) -> None:
    """Equation of section 3.2 of arXiv:2311.03099: mask, then divide by 1 - p."""
    _, v, b = models
    delta = flat(v) - flat(b)
    ours = computed(ak.dare(v - b, drop=0.7, seed=5)).double()
    mask = torch.from_numpy(seeded.uniform(5, "dare", KEY, 0, len(delta))) < 0.7
    torch.testing.assert_close(ours, torch.where(mask, 0, delta / (1 - 0.7)), rtol=1e-6, atol=1e-9)
    assert abs(mask.double().mean() - 0.7) < 0.02
    assert not torch.equal(ours, computed(ak.dare(v - b, drop=0.7, seed=6)).double())


def test_slerp_against_the_formula(models: list[ak.Checkpoint]) -> None:
    a, _, b = models
    x, y = flat(a), flat(b)
    angle = torch.arccos(x @ y / (x.norm() * y.norm()))
    for t in (0.0, 0.25, 1.0):
        expected = torch.sin((1 - t) * angle) / torch.sin(angle) * x + torch.sin(t * angle) / torch.sin(angle) * y
        torch.testing.assert_close(computed(ak.slerp(a, b, t=t)).double(), expected, rtol=1e-5, atol=1e-7)


def test_slerp_of_nearly_parallel_tensors_is_linear(models: list[ak.Checkpoint]) -> None:
    _, v, b = models
    expected = flat(v) + 0.3 * (flat(b) - flat(v))
    torch.testing.assert_close(computed(ak.slerp(v, b, t=0.3)).double(), expected, rtol=1e-5, atol=1e-7)


def test_methods_nest_and_respect_protection_and_masks(models: list[ak.Checkpoint]) -> None:
    a, v, b = models
    merged = a.protect("refiner") + 2 * ak.ties([ak.dare(v - b, drop=0.5), (a - b).only("layers")], density=1)
    assert merged.at("noise_refiner.0.ffn_norm1.weight", Rules()) == a.at("noise_refiner.0.ffn_norm1.weight", Rules())
    assert merged.text() == (
        "bridge.protect('refiner') + 2 * ties([dare(variant - base, drop=0.5, seed=0), (bridge - "
        "base).only('layers')], density=1)"
    )


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda a, v, b: ak.ties([a, b]), AlgebraError, "must be deltas"),
        (lambda a, v, b: ak.slerp(a, v - b), AlgebraError, "must be weights"),
        (lambda a, v, b: ak.slerp(a), AlgebraError, "number of operands"),
        (lambda a, v, b: ak.ties([]), AlgebraError, "number of operands"),
        (lambda a, v, b: ak.ties([v - b], densty=0.5), UnknownNameError, "did you mean 'density'"),
        (lambda a, v, b: computed(ak.ties([v - b], density=0)), AlgebraError, "out of range"),
        (lambda a, v, b: computed(ak.dare(v - b, drop=1)), AlgebraError, "out of range"),
        (lambda a, v, b: ak.dare(v - b, drop="x"), AlgebraError, "number is needed"),
    ],
)
def test_misuse_is_told(attempt, error: type[Exception], message: str, models: list[ak.Checkpoint]) -> None:
    with pytest.raises(error, match=message):
        attempt(*models)


def test_the_next_method_is_one_decorated_function(models: list[ak.Checkpoint], registry: None) -> None:

    @ak.method(elementwise=True)
    def clipped(delta: torch.Tensor, *, most: float = 0.01) -> torch.Tensor:
        return delta.clamp(-most, most)

    said = str(inspect.signature(ak.dare)).replace("'", "")
    assert said == "(delta: Delta, *, drop: Share = 0.9, seed: int = 0) -> Delta"
    assert "(deltas: Sequence[Delta]," in str(inspect.signature(ak.ties)).replace("'", "")
    assert "Drop entries at random" in (ak.dare.__doc__ or "")
    a, v, b = models
    expected = (flat(v) - flat(b)).clamp(-0.002, 0.002)
    torch.testing.assert_close(computed(clipped(v - b, most=0.002)).double(), expected, rtol=1e-6, atol=1e-9)
    assert (a + clipped(v - b)).text() == "bridge + clipped(variant - base, most=0.01)"
    with pytest.raises(AlgebraError, match="needs a default"):

        @ak.method()
        def careless(delta: torch.Tensor, *, most: float) -> torch.Tensor:
            return delta


def test_della_against_the_paper(models: list[ak.Checkpoint]) -> None:
    """MAGPRUNE of arXiv:2406.11617: probabilities by rank within each row, p from p_min to p_min + window."""
    _, v, b = models
    ours = computed(ak.della(v - b, drop=0.6, window=0.3, seed=7)).double()
    delta = (v[KEY].float() - b[KEY].float()).double()
    uniform = torch.from_numpy(seeded.uniform(7, "della", KEY, 0, delta.numel()).astype("float32")).view(delta.shape)
    expected = torch.zeros_like(delta)
    for row in range(delta.shape[0]):
        order = sorted(range(delta.shape[1]), key=lambda column: (-abs(float(delta[row, column])), column))
        for rank, column in enumerate(order):
            p = 0.45 + 0.3 * rank / (delta.shape[1] - 1)
            if uniform[row, column] >= p:
                expected[row, column] = delta[row, column] / (1 - p)
    torch.testing.assert_close(ours, expected.view(-1), rtol=1e-5, atol=1e-9)
    small, large = delta.abs().view(-1).argsort()[:500], delta.abs().view(-1).argsort()[-500:]
    assert (ours[small] == 0).double().mean() > (ours[large] == 0).double().mean() + 0.1
    both = ak.ties([ak.della(v - b, seed=1), ak.della(models[0] - b, seed=2)], density=1)  # the paper's three steps
    assert computed(both).abs().sum() > 0
    bias = "layers.0.adaLN_modulation.0.bias"  # one row
    assert 0.5 < (computed(ak.della(v - b, seed=1), bias) == 0).double().mean() < 0.9


def test_breadcrumbs_against_the_paper(models: list[ak.Checkpoint]) -> None:
    """arXiv:2312.06795: the tails of a tensor's magnitudes are masked."""
    _, v, b = models
    delta = flat(v) - flat(b)
    sizes = sorted(abs(float(value)) for value in delta)
    low, high = sizes[round(0.6 * len(sizes))], sizes[len(sizes) - round(0.05 * len(sizes)) - 1]
    expected = torch.tensor([float(value) if low <= abs(float(value)) <= high else 0.0 for value in delta])
    ours = computed(ak.breadcrumbs(v - b, smallest=0.6, largest=0.05))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    assert ours.abs().max() < delta.abs().max()
    assert not computed(ak.breadcrumbs(v - b, smallest=0.9, largest=0.1)).any()


@pytest.mark.parametrize("normalise", [0, 1])
def test_sce_against_the_paper(models: list[ak.Checkpoint], normalise: int) -> None:
    """Select, calculate, erase of arXiv:2408.07990, in float64."""
    a, v, b = models
    deltas = [flat(v) - flat(b), flat(a) - flat(b), 0.3 * (flat(a) - flat(v))]
    mean = sum(deltas) / 3
    varies = sum((delta - mean) ** 2 for delta in deltas) / 3
    limit = varies.sort(descending=True).values[round(0.4 * len(varies)) - 1]
    selected = [torch.where(varies >= limit, delta, 0) for delta in deltas]
    energy = [float((delta**2).sum()) for delta in selected]
    sign = sum(selected).sign()
    merged, left = torch.zeros_like(mean), torch.zeros_like(mean)
    for delta, one in zip(selected, energy, strict=True):
        agrees = (delta.sign() == sign) & (sign != 0)
        merged += torch.where(agrees, one / sum(energy) * delta, 0)
        left += torch.where(agrees, one / sum(energy), 0)
    expected = torch.where(left > 0, merged / left.clamp(min=1e-30), 0) if normalise else merged
    ours = computed(ak.sce([v - b, a - b, 0.3 * (a - v)], top=0.4, normalise=normalise))
    close = torch.isclose(ours.double(), expected, rtol=1e-4, atol=1e-7)
    assert close.double().mean() > 0.9995  # an entry whose variance lies at the limit may fall on either side of it
    torch.testing.assert_close(computed(ak.sce([v - b])), (v[KEY].float() - b[KEY].float()).view(-1))


def test_model_stock_against_the_paper(models: list[ak.Checkpoint]) -> None:
    """Equation 7 of arXiv:2403.19522."""
    a, v, b = models
    deltas = [flat(v) - flat(b), flat(a) - flat(b), 0.5 * (flat(a) - flat(b)) + 0.2 * (flat(v) - flat(b))]
    unit = [delta / delta.norm() for delta in deltas]
    cosine = float((unit[0] @ unit[1] + unit[0] @ unit[2] + unit[1] @ unit[2]) / 3)
    assert cosine > 0.3
    t = 3 * cosine / (1 + 2 * cosine)
    ours = computed(ak.model_stock([v - b, a - b, 0.5 * (a - b) + 0.2 * (v - b)]))
    torch.testing.assert_close(ours.double(), t * sum(deltas) / 3, rtol=1e-4, atol=1e-7)
    alone, opposed = computed(ak.model_stock([v - b])), computed(ak.model_stock([v - b, b - v]))
    torch.testing.assert_close(alone.double(), deltas[0], rtol=1e-6, atol=1e-9)
    assert not opposed.any()


def test_nuslerp_by_rows_and_whole(models: list[ak.Checkpoint]) -> None:
    a, v, b = models
    x, y = ((one[KEY].double() - b[KEY].double()) for one in (v, a))
    expected = torch.empty_like(x)
    for row in range(x.shape[0]):
        angle = torch.arccos(x[row] @ y[row] / (x[row].norm() * y[row].norm()))
        expected[row] = (torch.sin(0.7 * angle) * x[row] + torch.sin(0.3 * angle) * y[row]) / torch.sin(angle)
    ours = computed(ak.nuslerp(v - b, a - b, t=0.3, rows=1)).double()
    torch.testing.assert_close(ours, expected.view(-1), rtol=1e-4, atol=1e-6)
    whole = computed(ak.nuslerp(v - b, a - b, t=0.3)).double()
    angle = torch.arccos((x * y).sum() / (x.norm() * y.norm()))
    torch.testing.assert_close(
        whole,
        ((torch.sin(0.7 * angle) * x + torch.sin(0.3 * angle) * y) / torch.sin(angle)).view(-1),
        rtol=1e-4,
        atol=1e-6,
    )
    same = computed(ak.nuslerp(v - b, 2 * (v - b), t=0.5, rows=1)).double()
    torch.testing.assert_close(same, 1.5 * x.view(-1), rtol=1e-5, atol=1e-7)


def test_the_karcher_mean_is_where_the_arcs_cancel(models: list[ak.Checkpoint]) -> None:
    a, v, b = models
    points = [flat(one) for one in (a, v, b)]
    ours = computed(ak.karcher([a, v, b])).double()
    centre = ours / ours.norm()
    arcs = torch.zeros_like(centre)
    for point in points:
        unit = point / point.norm()
        angle = torch.arccos((centre @ unit).clamp(-1, 1))
        arcs += (unit - torch.cos(angle) * centre) * angle / torch.sin(angle)
    assert arcs.norm() < 1e-4
    torch.testing.assert_close(ours.norm(), sum(point.norm() for point in points) / 3, rtol=1e-5, atol=0)
    # Of two points it is the middle of the arc, but for their lengths.
    halfway = computed(ak.slerp(a, b, t=0.5)).double()
    two = computed(ak.karcher([a, b])).double()
    unit_a, unit_b = points[0] / points[0].norm(), points[2] / points[2].norm()
    torch.testing.assert_close(two / two.norm(), (unit_a + unit_b) / (unit_a + unit_b).norm(), rtol=1e-4, atol=1e-7)
    assert float(halfway @ two / (halfway.norm() * two.norm())) > 0.9999
    with pytest.raises(AlgebraError, match="iterations"):
        computed(ak.karcher([a, b], iterations=0))


@pytest.mark.parametrize("whole", [0.0, 0.5])
def test_cosine_add(models: list[ak.Checkpoint], whole: float) -> None:
    a, v, b = models
    x, y = a[KEY].double(), v[KEY].double()
    expected = torch.empty_like(x)
    for column in range(x.shape[1]):
        cosine = x[:, column] @ y[:, column] / (x[:, column].norm() * y[:, column].norm())
        if whole:
            cosine = (cosine + (x * y).sum() / (x.norm() * y.norm())) / 2
        k = 1 - min(max(float(cosine) - 0.02, 0.0), 1.0)
        expected[:, column] = x[:, column] + k * (y[:, column] - x[:, column])
    ours = computed(ak.cosine_add(a, v, alpha=0.02, whole=whole)).double()
    torch.testing.assert_close(ours, expected.view(-1), rtol=1e-4, atol=1e-6)
    likes_itself = computed(ak.cosine_add(v, b)).double()  # the variant is near its base: most of it stays
    assert (likes_itself - flat(v)).norm() < 0.1 * (flat(b) - flat(v)).norm()


def test_train_difference(models: list[ak.Checkpoint]) -> None:
    a, v, b = models
    x, y, z = flat(a), flat(v), flat(b)
    near, far = (y - z).abs(), (y - x).abs()
    expected = x + 1.8 * 0.5 * torch.where(near + far > 0, (y - z) * far / (near + far).clamp(min=1e-30), 0)
    torch.testing.assert_close(
        computed(ak.train_difference(a, v, b, alpha=0.5)).double(), expected, rtol=1e-5, atol=1e-7
    )
    assert torch.equal(computed(ak.train_difference(v, v, b)), v[KEY].float().view(-1))  # it has learned all of it


@pytest.mark.parametrize(
    "text",
    [
        "a + 0.7 * ties([della(v - b, seed=1), della(a - b, seed=2)], density=1)",
        "a + breadcrumbs(v - b, smallest=0.5)",
        "a + sce([v - b, a - b], top=0.2)",
        "a + model_stock([v - b, a - b])",
        "a + common(v - b, a - b)",
        "a + 0.5 * union(v - b, a - b)",
        "a + nuslerp(v - b, a - b, t=0.2, rows=1)",
        "karcher([a, v, b])",
        "cosine_add(a, v)",
        "train_difference(a.protect('refiner'), v, b)",
    ],
)
def test_they_stream_and_come_back_from_their_recipes(text: str, models: list[ak.Checkpoint], tmp_path: Path) -> None:
    from alkahest.recipes.text import parse

    names = dict(zip("avb", models, strict=True))
    expression = parse(text, names)
    assert parse(expression.text(), {one.name: one for one in models}).text() == expression.text()
    one = expression.save(tmp_path / "one.safetensors", threads=1)
    expression.save(tmp_path / "two.safetensors", threads=2)
    assert one.path.read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda d: ak.della(d, drop=0.95, window=0.2),
        lambda d: ak.della(d, drop=0.05, window=0.2),
        lambda d: ak.breadcrumbs(d, smallest=1.5),
        lambda d: ak.breadcrumbs(d, largest=-0.1),
        lambda d: ak.sce([d], top=0),
        lambda d: ak.ties([d], density=0),
    ],
)
def test_settings_out_of_range(make: object, models: list[ak.Checkpoint]) -> None:
    _, v, b = models
    with pytest.raises(AlgebraError, match="out of range"):
        computed(make(v - b))  # type: ignore[operator]


def test_running_a_cell_again_replaces_its_method(models: list[ak.Checkpoint], registry: None) -> None:
    a, v, b = models
    cell = "@ak.method()\ndef shrunk(delta: torch.Tensor, *, by: float = 2.0) -> torch.Tensor:\n    return delta / by"
    space: dict[str, object] = {"ak": ak, "torch": torch, "__name__": "__main__"}
    exec(cell, space)
    before = a + space["shrunk"](v - b)  # type: ignore[operator]
    table = ak.delta_table(space["shrunk"](v - b))  # type: ignore[operator]
    exec(cell.replace("delta / by", "delta * by"), space)
    after = a + space["shrunk"](v - b)  # type: ignore[operator]
    assert before.text() == after.text()
    assert torch.equal(computed(before), computed(a + 0.5 * (v - b)))
    assert torch.equal(computed(after), computed(a + 2 * (v - b)))
    # What is remembered of the old body is not given for the new one.
    again = ak.delta_table(space["shrunk"](v - b))  # type: ignore[operator]
    assert again.delta_norm.sum() == pytest.approx(4 * table.delta_norm.sum(), rel=1e-5)
    recipe = parse("a + shrunk(v - b)", {"a": a, "v": v, "b": b})
    assert torch.equal(computed(recipe), computed(after))


@pytest.mark.parametrize("name", ["dare", "lerp", "made_up"])
def test_a_name_that_means_something_else_stays_its_own(name: str, registry: None) -> None:
    space: dict[str, object] = {"ak": ak, "torch": torch, "__name__": "__main__"}
    with pytest.raises(AlgebraError, match=f"'{name}' is taken"):
        exec(f"@ak.method()\ndef {name}(delta: torch.Tensor) -> torch.Tensor:\n    return delta", space)


def test_recipes_call_what_is_written_down_and_nothing_else() -> None:
    shipped = {name for name, made in methods.REGISTRY.items() if not made.definition}
    assert {function.__name__ for function in _FUNCTIONS} == shipped | set(methods.RESERVED)


def test_what_two_deltas_share_and_what_either_holds(models: list[ak.Checkpoint]) -> None:
    a, v, b = models
    x, y = v - b, a - b
    left, right = ((one[KEY].float() - b[KEY].float()).double().view(-1) for one in (v, a))
    agree = torch.sign(left) == torch.sign(right)
    small, large = torch.minimum(left.abs(), right.abs()), torch.maximum(left.abs(), right.abs())
    shared = torch.where(agree, torch.sign(left) * small, 0.0)
    either = torch.where(agree, torch.sign(left) * large, left + right)
    assert 0.2 < agree.double().mean() < 0.8
    torch.testing.assert_close(computed(ak.common(x, y)).double(), shared, rtol=1e-6, atol=0)
    torch.testing.assert_close(computed(ak.union(x, y)).double(), either, rtol=1e-5, atol=1e-8)
    # Where one of them holds nothing they share nothing, and either is the other.
    only = x.only("layers.0")
    assert ak.common(only, y).at(KEY, Rules()) is None
    assert torch.equal(computed(ak.union(only, y)), computed(y))
