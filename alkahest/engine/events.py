"""Progress of anything that takes longer than a second, as a generator of events; and the way to its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Work done and in all (bytes, where it reads or writes; else pieces), what is at hand, and at the end the result.

    Drawing and training add to it what can be seen on the way. Closing the generator stops the work.
    """

    done: int
    total: int
    key: str
    result: Any = field(default=None, repr=False)


def result_of(events: Iterator[Event]) -> Any:
    """Run a generator of events to its end; the result, which its last event carries."""
    *_, last = events
    return last.result


def in_turn(streams: Iterable[Iterator[Event]], conclude: Callable[..., Any]) -> Iterator[Event]:
    """The events of several generators as one, whose result ``conclude`` makes of theirs."""
    results, before = [], 0
    for events in streams:
        for event in events:
            if event.result is None:
                yield Event(before + event.done, before + event.total, event.key)
        results.append(event.result)
        before += event.total
    yield Event(before, before, "done", conclude(*results))
