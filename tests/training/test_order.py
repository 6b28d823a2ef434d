from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from alkahest.errors import AlkahestError
from alkahest.pictures.encoded import Encoded, Item
from alkahest.training.order import Order


def dataset(name: str, *sizes: int) -> Encoded:
    """Examples in one bucket each: sizes says how many there are in bucket 0, 1, ..."""
    items = [
        Item(f"{name} {bucket} {n}", Path("x"), Path("y"), (8, 8 + bucket, 32))
        for bucket, count in enumerate(sizes)
        for n in range(count)
    ]
    return Encoded(name, items, torch.zeros(1, 4))


def test_an_epoch_shows_everything_once() -> None:
    order = Order([dataset("a", 12, 8)], [1.0], batch=4, seed=0)
    batches = [order.take() for _ in range(5)]
    assert order.epoch == 0
    assert sorted(pick for batch in batches for pick in batch.picks) == [(0, n) for n in range(20)]
    second = [order.take() for _ in range(5)]
    assert order.epoch == 1
    assert sorted(pick for batch in second for pick in batch.picks) == [(0, n) for n in range(20)]
    assert second != batches
    for batch in batches:
        assert {order.datasets[0].items[n].bucket for _, n in batch.picks} == {batch.bucket}


def test_what_does_not_fill_a_batch_is_filled_up() -> None:
    order = Order([dataset("a", 5, 1)], [1.0], batch=4, seed=1)
    batches = [order.take() for _ in range(3)]
    assert all(len(batch.picks) == 4 for batch in batches)
    assert {pick for batch in batches for pick in batch.picks} == {(0, n) for n in range(6)}


def test_shares_hold_and_everybody_has_a_turn() -> None:
    order = Order([dataset("a", 40), dataset("b", 10), dataset("c", 10)], [0.5, 0.5, 0.0], batch=6, seed=2)
    assert order.counts == [30, 30, 0]
    seen: Counter[tuple[int, int]] = Counter()
    for _ in range(40):  # four epochs of ten batches
        seen.update(order.take().picks)
    assert sum(count for (number, _), count in seen.items() if number == 0) == 120
    assert {count for (number, _), count in seen.items() if number == 0} == {3}
    assert {count for (number, _), count in seen.items() if number == 1} == {12}
    assert not any(number == 2 for number, _ in seen)


def test_it_goes_on_where_it_was() -> None:
    datasets, shares = [dataset("a", 7, 9), dataset("b", 5)], [0.7, 0.3]
    whole = Order(datasets, shares, batch=3, seed=3)
    first = [whole.take() for _ in range(11)]
    state = whole.state
    rest = [whole.take() for _ in range(9)]
    again = Order(datasets, shares, batch=3, seed=3)
    assert [again.take() for _ in range(11)] == first
    fresh = Order(datasets, shares, batch=3, seed=3)
    fresh.go_to(state)
    assert [fresh.take() for _ in range(9)] == rest
    assert [Order(datasets, shares, batch=3, seed=4).take() for _ in range(11)] != first


@pytest.mark.parametrize(("shares", "batch"), [([1.0, 1.0], 2), ([-1.0], 2), ([0.0], 2), ([1.0], 0)])
def test_bad_input(shares: list[float], batch: int) -> None:
    with pytest.raises(AlkahestError):
        Order([dataset("a", 3)], shares, batch, seed=0)
