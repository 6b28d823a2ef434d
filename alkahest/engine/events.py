"""Progress of anything that takes longer than a second, as a generator of events; and the way to its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Work done and in all (bytes, where it reads or writes; else pieces), what is at hand, and at the end the result.

    Drawing and training add to it what can be seen on the way; ``so_far`` makes what there is to show by now, a picture
    or a table. Closing the generator stops the work.
    """

    done: int  # bytes or pieces
    total: int  # the same, in all
    key: str  # the tensor, picture or step at hand
    result: Any = field(default=None, repr=False)  # of the last event
    so_far: Callable[[], Any] | None = field(default=None, repr=False, compare=False)  # what there is to show by now

    def moved(self, done: int, total: int) -> Event:
        """The same as a part of longer work, its result left out."""
        return Event(done, total, self.key, so_far=self.so_far)


Watch = Callable[[Iterator[Any], str], Iterator[Any]]
_watch: Watch | None = None


def watch_with(watch: Watch | None) -> None:
    """Have the events of whatever runs to its end pass through ``watch(events, operation)``, which shows them.

    >>> watch_with(alkahest.lab.cell_progress.watch)   # what `import alkahest` does in a notebook's kernel
    """
    global _watch
    _watch = watch


def watch(events: Iterator[Any], operation: str) -> Iterator[Any]:
    """The same events, shown while they come, where somebody asked for that: nowhere but in notebooks."""
    return events if _watch is None else _watch(events, operation)


def result_of(events: Iterator[Event], operation: str = "working") -> Any:
    """Run a generator of events to its end; the result, which its last event carries."""
    *_, last = watch(events, operation)
    return last.result


def in_turn(streams: Iterable[Iterator[Event]], conclude: Callable[..., Any]) -> Iterator[Event]:
    """The events of several generators as one, whose result ``conclude`` makes of theirs."""
    results, before = [], 0
    for events in streams:
        for event in events:
            if event.result is None:
                yield event.moved(before + event.done, before + event.total)
        results.append(event.result)
        before += event.total
    yield Event(before, before, "done", conclude(*results))
