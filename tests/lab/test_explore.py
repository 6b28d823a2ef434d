from __future__ import annotations

import base64
import threading
import time
from typing import Any

import pytest
from matplotlib.figure import Figure
from waiting import until

from alkahest.errors import AlkahestError, UnknownNameError
from alkahest.lab.explore import explore


def drawing(seen: list[dict[str, Any]]) -> Any:
    def draw(figure: Figure, *, k: float = 2.0, statistic: str = "rms", logged: bool = True, bins: int = 8) -> str:
        seen.append({"k": k, "statistic": statistic, "logged": logged, "bins": bins})
        if k < 0:
            raise ValueError("k is <negative>")
        figure.subplots().plot([0, k])
        return f"a line up to {k} & more"

    return draw


def settled(seen: list[Any], count: int) -> bool:
    """Whether ``count`` pictures have been drawn, and no more come."""
    until(lambda: len(seen) >= count)
    time.sleep(0.3)
    return len(seen) == count


def test_controls_follow_from_the_signature_and_redraw() -> None:
    seen: list[dict[str, Any]] = []
    panel = explore(drawing(seen), statistic=["rms", "relative"], k=(0.1, 1000, "log"))
    assert seen == [{"k": 2.0, "statistic": "rms", "logged": True, "bins": 8}]  # drawn once, at once
    kinds = {name: type(control).__name__ for name, control in panel.controls.items()}
    assert kinds == {"k": "FloatText", "statistic": "Dropdown", "logged": "Checkbox", "bins": "IntText"}
    assert all(control.description for control in panel.controls.values())
    assert 'alt="a line up to 2.0 &amp; more"' in panel.picture.value
    for value in (3.0, 4.0, 171.1):  # changes in quick succession are drawn once
        panel.controls["k"].value = value
    panel.controls["statistic"].value = "relative"
    assert settled(seen, 2)
    assert seen[-1] == {"k": 171.1, "statistic": "relative", "logged": True, "bins": 8}
    assert panel.values["k"] == 171.1
    assert until(lambda: "up to 171.1" in panel.picture.value)


def test_a_failing_draw_is_said_and_the_next_one_works() -> None:
    seen: list[dict[str, Any]] = []
    panel = explore(drawing(seen))
    old = panel.picture.value
    panel.controls["k"].value = -1.0
    assert settled(seen, 2)
    assert "ValueError: k is &lt;negative&gt;" in panel.status.value
    assert panel.picture.value == old
    panel.controls["k"].value = 1.0
    assert settled(seen, 3)
    assert panel.status.value == ""


def test_the_picture_goes_with_the_notebook() -> None:
    panel = explore(drawing([]))
    bundle = panel._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"] == "a line up to 2.0 & more"
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_two_panels_do_not_draw_at_the_same_time() -> None:
    busy, most = [0], [0]

    def draw(figure: Figure, *, k: float = 1.0) -> str:
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.05)
        busy[0] -= 1
        return "done"

    panels = [explore(draw) for _ in range(2)]
    threads = [threading.Thread(target=panel.redraw) for panel in panels for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_bad_input() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'statistic'"):
        explore(drawing([]), statistics=["rms"])
    with pytest.raises(AlkahestError, match="not in its menu"):
        explore(drawing([]), statistic=["relative"])
    for given in ((3, 3), (0, 10, "log"), (1, 10, "linear")):
        with pytest.raises(AlkahestError, match="cannot be a slider"):
            explore(drawing([]), k=given)
    with pytest.raises(AlkahestError, match="every argument of draw but the figure needs a default"):
        explore(lambda figure, k: "")
    with pytest.raises(AlkahestError, match="no control is known"):
        explore(lambda figure, k=None: "")
