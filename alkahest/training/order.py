"""In which order a training run sees its examples: a function of the seed, so that a run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alkahest.errors import AlkahestError
from alkahest.model import seeded
from alkahest.pictures.encoded import Bucket, Encoded

Pick = tuple[int, int]  # number of the dataset, number of the example in it


@dataclass(frozen=True)
class Batch:
    """Examples of one bucket that are trained on together."""

    bucket: Bucket
    picks: tuple[Pick, ...]


class Order:
    """Batches of several datasets in given shares, shuffled; the same for the same seed.

    >>> order = Order([people, animals], [0.8, 0.2], batch=4, seed=0); order.take()

    An epoch is as many examples as there are; of each dataset it takes its share, going on from where the last
    epoch stopped, so that every example has its turn. Batches hold one bucket; what does not fill one is filled
    up from the same bucket.
    """

    def __init__(self, datasets: Sequence[Encoded], shares: Sequence[float], batch: int, seed: int) -> None:
        if len(datasets) != len(shares) or not datasets or min(shares) < 0 or sum(shares) <= 0:
            raise AlkahestError("train", "every dataset needs a share, and some must be above zero", found=list(shares))
        if batch < 1:
            raise AlkahestError("train", "batch must be at least 1", found=batch)
        self.datasets, self.batch, self.seed = datasets, batch, seed
        self.counts = _counts(sum(map(len, datasets)), shares)
        self.epoch, self.taken = 0, 0
        self._batches = self._of_epoch(0)

    def take(self) -> Batch:
        """The next batch."""
        if self.taken == len(self._batches):
            self.epoch, self.taken = self.epoch + 1, 0
            self._batches = self._of_epoch(self.epoch)
        self.taken += 1
        return self._batches[self.taken - 1]

    @property
    def state(self) -> dict[str, int]:
        """Where it is, for `go_to`."""
        return {"epoch": self.epoch, "taken": self.taken}

    def go_to(self, state: Mapping[str, int]) -> None:
        """Go on from a state of an order of the same datasets and seed."""
        self.epoch, self.taken = int(state["epoch"]), int(state["taken"])
        self._batches = self._of_epoch(self.epoch)

    def _of_epoch(self, epoch: int) -> list[Batch]:
        by_bucket: dict[Bucket, list[Pick]] = {}
        for number, (dataset, count) in enumerate(zip(self.datasets, self.counts, strict=True)):
            for example in self._stream(number, len(dataset), epoch * count, count):
                by_bucket.setdefault(dataset.items[example].bucket, []).append((number, example))
        rng = seeded.generator(self.seed, "order", "", epoch)
        batches = []
        for bucket in sorted(by_bucket):
            picks = by_bucket[bucket]
            picks = [picks[n] for n in rng.permutation(len(picks))]
            picks += [picks[n % len(picks)] for n in range(-len(picks) % self.batch)]
            batches += [Batch(bucket, tuple(picks[n : n + self.batch])) for n in range(0, len(picks), self.batch)]
        return [batches[n] for n in rng.permutation(len(batches))]

    def _stream(self, dataset: int, length: int, start: int, count: int) -> Iterator[int]:
        """Examples ``start`` and following of a dataset that is gone through again and again, each time shuffled."""
        for round_ in range(start // length, -(-(start + count) // length)):
            shuffled = seeded.generator(self.seed, f"dataset {dataset}", "", round_).permutation(length)
            first, last = max(start - round_ * length, 0), min(start + count - round_ * length, length)
            yield from (int(n) for n in shuffled[first:last])


def _counts(total: int, shares: Sequence[float]) -> list[int]:
    """How many examples of each dataset an epoch takes: as near to its share as whole numbers allow."""
    wanted = np.asarray(shares, float) / sum(shares) * total
    counts = np.floor(wanted).astype(int)
    for number in np.argsort(counts - wanted, kind="stable")[: total - int(counts.sum())]:
        counts[number] += 1
    return [int(count) for count in counts]
