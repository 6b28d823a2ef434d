from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from waiting import until

from alkahest.errors import AlkahestError
from alkahest.lab.jobs import Job


def counting(total: int, gate: threading.Semaphore | None = None, closed: list[bool] | None = None) -> Iterator[Any]:
    try:
        for done in range(1, total + 1):
            if gate is not None:
                gate.acquire()
            yield SimpleNamespace(done=done, total=total, key=f"layers.{done} <b>", result=done * 10)
    finally:
        if closed is not None:
            closed.append(True)


def test_it_runs_to_the_end_and_can_start_again() -> None:
    results: list[int] = []
    job = Job(lambda: counting(5), on_result=results.append, title="Count")
    assert job.start_button.description == "Count"
    assert job.cancel_button.disabled
    for _ in range(2):
        job.start_button.click()
        assert job.wait(10) == 50
        assert not job.running
        assert job.bar.value == 1.0
        assert job.bar.bar_style == "success"
        assert "done in" in job.status.value
        assert not job.start_button.disabled
        assert job.cancel_button.disabled
    assert results == [50, 50]
    assert job.error is None


def test_it_shows_what_is_at_hand() -> None:
    gate = threading.Semaphore(1)
    job = Job(lambda: counting(4, gate))
    job.start()
    assert until(lambda: "1 of 4" in job.status.value)
    assert "layers.1 &lt;b&gt;" in job.status.value
    assert job.bar.value == 0.25
    assert job.running
    job.start()  # running already: nothing happens
    gate.release(3)
    assert job.wait(10) == 40


def test_cancel_closes_the_generator() -> None:
    gate, closed = threading.Semaphore(2), list[bool]()
    job = Job(lambda: counting(1000, gate, closed))
    job.start()
    assert job.start_button.disabled
    job.cancel_button.click()
    assert "cancelling" in job.status.value or "cancelled" in job.status.value
    gate.release(1000)
    assert job.wait(10) is None
    assert closed == [True]
    assert "cancelled after" in job.status.value
    assert job.bar.bar_style == "warning"


def test_what_goes_wrong_is_shown_and_kept() -> None:
    def failing() -> Iterator[Any]:
        yield SimpleNamespace(done=1, total=2, key="a")
        raise AlkahestError("measure", "something is wrong", fix="do it right")

    job = Job(failing)
    job.start()
    job.wait(10)
    assert isinstance(job.error, AlkahestError)
    assert "fix: do it right" in job.status.value
    assert job.bar.bar_style == "danger"
    assert not job.start_button.disabled
    broken = Job(lambda: counting(1), on_result=lambda _: 1 / 0)
    broken.start()
    broken.wait(10)
    assert "ZeroDivisionError" in broken.status.value


def test_sizes_are_said_as_sizes() -> None:
    gate = threading.Semaphore(1)
    job = Job(
        lambda: (SimpleNamespace(done=n * 10**9, total=12 * 10**9, key="") for n in range(1, 13) if gate.acquire()),
        unit="B",
    )
    job.start()
    assert until(lambda: "of 12.00 GB" in job.status.value)
    assert "1.00 GB of 12.00 GB" in job.status.value
    gate.release(12)
    job.wait(10)
    assert job._repr_mimebundle_()["text/plain"] == "Job: Start"
