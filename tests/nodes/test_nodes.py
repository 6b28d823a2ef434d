"""What can be said of the nodes without ComfyUI: their declarations. What they do is tested in a real one."""

from __future__ import annotations

from alkahest.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from alkahest.workflow.widgets import OTHERS

SOCKETS = ("MODEL",)


def test_the_widgets_are_read_in_the_order_that_they_are_declared_in() -> None:
    for name, kind in NODE_CLASS_MAPPINGS.items():
        declared = {**kind.INPUT_TYPES()["required"], **kind.INPUT_TYPES().get("optional", {})}
        widgets = tuple(one for one, (form, *_) in declared.items() if form not in SOCKETS)
        assert OTHERS[name] == widgets, name


def test_every_node_says_what_it_does_and_puts_out() -> None:
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for name, kind in NODE_CLASS_MAPPINGS.items():
        assert callable(getattr(kind, kind.FUNCTION)), name
        assert kind.CATEGORY == "alkahest"
        assert kind.DESCRIPTION
        assert kind.RETURN_TYPES
