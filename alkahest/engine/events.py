"""Progress as a generator of events, and the way from a generator to its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Progress: work done and in all (bytes, where it reads or writes), the tensor at hand, and at the end the result."""

    done: int
    total: int
    key: str
    result: Any = field(default=None, repr=False)


def finished(events: Iterator[Event]) -> Any:
    """Run a generator of events to its end; its result."""
    *_, last = events
    return last.result


def concluded(streams: Iterable[Iterator[Event]], conclude: Callable[..., Any]) -> Iterator[Event]:
    """The events of several measurements as one, whose result ``conclude`` makes of theirs."""
    results, before = [], 0
    for events in streams:
        for event in events:
            if event.result is None:
                yield Event(before + event.done, before + event.total, event.key)
        results.append(event.result)
        before += event.total
    yield Event(before, before, "done", conclude(*results))
