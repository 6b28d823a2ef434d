"""The form in which ComfyUI's editor saves a workflow, brought to nodes and what feeds them.

What only the editor knows is resolved as the editor does before it sends a graph to the server: subgraphs are
put in the place of their instances (with ids such as ``76:66``), reroutes and primitives are followed, bypassed
nodes pass their input through, muted ones feed nothing, and a widget that is promoted to the outside of a
subgraph counts with the value that it has there.

Source: workflow format 0.4 and ComfyUI_frontend's ``ExecutableNodeDTO``; its own templates for the order of
values of promoted widgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from alkahest.errors import RecipeError
from alkahest.workflow.widgets import lora_lines, widget_names

_MUTED, _BYPASSED = 2, 4
_FROM_OUTSIDE, _TO_OUTSIDE = -10, -20  # a subgraph's own inputs and outputs, as its links name them
_REROUTES = ("Reroute", "Reroute (rgthree)")
_ONLY_IN_EDITOR = ("Note", "MarkdownNote", *_REROUTES, "PrimitiveNode", "SetNode", "GetNode")
_MAX_NODES, _MAX_DEPTH = 20_000, 40


@dataclass(frozen=True)
class Link:
    """An input that is the output number ``slot`` of another node."""

    node: str
    slot: int


@dataclass(frozen=True)
class Absent:
    """An input that nothing feeds, or whose value the file does not say, and why."""

    why: str


_UNSAID = Absent("nothing is connected to it")


@dataclass
class _Scope:
    """One graph of nodes and links: the workflow itself, or one instance of a subgraph in it."""

    file: object
    graph: Mapping[str, Any]
    prefix: str = ""
    parent: _Scope | None = None
    instance: Mapping[str, Any] = field(default_factory=dict)
    promoted: Mapping[tuple[str, str], Any] = field(default_factory=dict)  # (node, widget) -> value from outside

    def __post_init__(self) -> None:
        self.nodes = {
            str(_get(node, "id", (int, str), self.file)): node for node in _list(self.graph, "nodes", dict, self.file)
        }
        self.ends = [
            _ends(link, self.file)
            for link in _list(self.graph, "links", (list, dict, type(None)), self.file)
            if link is not None
        ]
        self.links = {one: (origin, slot) for one, origin, slot, _, _ in self.ends}


def flatten(workflow: Mapping[str, Any], file: object) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every node that the server would see: id, class, and inputs by name."""
    definitions = workflow.get("definitions") or {}
    subgraphs = definitions.get("subgraphs") or [] if isinstance(definitions, dict) else []
    known = (
        {str(one.get("id")): one for one in subgraphs if isinstance(one, dict)} if isinstance(subgraphs, list) else {}
    )
    editor = _Editor(known, file)
    yield from editor.nodes_of(_Scope(file, workflow))


class _Editor:
    def __init__(self, subgraphs: Mapping[str, Any], file: object) -> None:
        self.subgraphs, self.file, self.count = subgraphs, file, 0

    def nodes_of(self, scope: _Scope) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for one, node in scope.nodes.items():
            kind = _kind(node, self.file)
            if kind in _ONLY_IN_EDITOR or node.get("mode", 0) in (_MUTED, _BYPASSED):
                continue
            self.count += 1
            if self.count > _MAX_NODES:
                raise RecipeError(
                    "workflow", "the workflow has too many nodes", file=self.file, expected=f"at most {_MAX_NODES:,}"
                )
            if kind in self.subgraphs:
                yield from self.nodes_of(self.inside(scope, one, node))
            else:
                yield scope.prefix + one, kind, self.inputs(scope, one, node)

    def inside(self, scope: _Scope, one: str, node: Mapping[str, Any]) -> _Scope:
        if scope.prefix.count(":") >= _MAX_DEPTH:
            raise RecipeError(
                "workflow",
                "subgraphs are nested without end",
                file=self.file,
                found=f"a subgraph within itself at {scope.prefix[:60]}...",
            )
        definition = self.subgraphs[_kind(node, self.file)]
        inner = _Scope(self.file, definition, f"{scope.prefix}{one}:", scope, node)
        inner.promoted = _promotions(inner, scope.promoted, one)
        return inner

    def inputs(self, scope: _Scope, one: str, node: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        slots = _list(node, "inputs", dict, self.file)
        values = node.get("widgets_values")
        if isinstance(values, dict):
            found |= values
        elif isinstance(values, list):
            kind, listed = _kind(node, self.file), [_widget(slot) for slot in slots if _widget(slot)]
            names = widget_names(kind, listed, values)
            if names is None:  # which value is whose cannot be told
                found |= dict.fromkeys(listed, Absent("the file does not say which of its values this is"))
            else:
                found |= dict(zip(names, values, strict=False))
            found |= lora_lines(kind, values)
        for (owner, widget), value in scope.promoted.items():
            if owner == one:
                found[widget] = value
        for slot in slots:
            name = _widget(slot) or str(slot.get("name"))
            if slot.get("link") is not None:
                fed = self.source(scope, slot["link"], ())
                if fed is not _UNSAID or name not in found:  # an inner widget counts where the outside says nothing
                    found[name] = fed
            elif name not in found:
                found[name] = _UNSAID
        return found

    def source(self, scope: _Scope, link: Any, seen: tuple[tuple[str, Any], ...]) -> Any:
        """What feeds a link: a `Link` to a node that the server sees, a literal, or `Absent`."""
        place = (scope.prefix, link)
        if place in seen:
            raise RecipeError(
                "workflow",
                "links run in a circle",
                file=self.file,
                found=f"link {link} leads back to itself",
                fix="the editor cannot run this either; take the loop out",
            )
        if not isinstance(link, (int, str)) or link not in scope.links:
            return Absent(f"its link {link!r} does not exist")
        origin, slot = scope.links[link]
        if origin == str(_FROM_OUTSIDE):
            return self.from_outside(scope, slot, (*seen, place))
        node = scope.nodes.get(origin)
        if node is None:
            return Absent(f"it comes from node {scope.prefix}{origin}, which does not exist")
        return self.output(scope, origin, node, slot, (*seen, place))

    def output(
        self, scope: _Scope, one: str, node: Mapping[str, Any], slot: int, seen: tuple[tuple[str, Any], ...]
    ) -> Any:
        kind, mode, name = _kind(node, self.file), node.get("mode", 0), f"{scope.prefix}{one}"
        slots = _list(node, "inputs", dict, self.file)
        if mode == _MUTED:
            return Absent(f"node {name} ({kind}) is muted")
        if mode == _BYPASSED:
            through = _through(node, slots, slot, self.file)
            return (
                self.source(scope, through["link"], seen)
                if through
                else Absent(f"node {name} ({kind}) is bypassed and has no input of that type")
            )
        values = node.get("widgets_values")
        first = values[0] if isinstance(values, list) and values else None
        if kind == "PrimitiveNode":
            return first
        if kind in _REROUTES:
            return (
                self.source(scope, slots[0]["link"], seen)
                if slots and slots[0].get("link") is not None
                else Absent(f"node {name} ({kind}) has no input")
            )
        if kind == "GetNode":
            return self.named(scope, first, name, seen)
        if kind in self.subgraphs:
            inner = self.inside(scope, one, node)
            for link, _, _, target, number in inner.ends:
                if target == str(_TO_OUTSIDE) and number == slot:
                    return self.source(inner, link, seen)
            return Absent(f"output {slot} of subgraph {name} is connected to nothing inside")
        return Link(name, slot)

    def named(self, scope: _Scope, name: Any, node: str, seen: tuple[tuple[str, Any], ...]) -> Any:
        """What a SetNode of KJNodes (here or further out) stores under a name."""
        here: _Scope | None = scope
        while here is not None:
            for one in here.nodes.values():
                values, slots = one.get("widgets_values"), _list(one, "inputs", dict, self.file)
                if _kind(one, self.file) == "SetNode" and isinstance(values, list) and values[:1] == [name] and slots:
                    return self.source(here, slots[0].get("link"), seen)
            here = here.parent
        return Absent(f"node {node} (GetNode) asks for {name!r}, which no SetNode stores")

    def from_outside(self, scope: _Scope, slot: int, seen: tuple[tuple[str, Any], ...]) -> Any:
        definitions = _list(scope.graph, "inputs", dict, self.file)
        if scope.parent is None or not 0 <= slot < len(definitions):
            return Absent(f"it comes from input {slot} of a subgraph, which has none")
        name = definitions[slot].get("name")
        for outer in _list(scope.instance, "inputs", dict, self.file):
            if outer.get("name") == name and outer.get("link") is not None:
                fed = self.source(scope.parent, outer["link"], seen)
                if fed is not _UNSAID:  # else it is itself promoted further out, and nothing is set there
                    return fed
        return scope.promoted.get(("", str(name)), _UNSAID)


def _promotions(inner: _Scope, outer: Mapping[tuple[str, str], Any], one: str) -> dict[tuple[str, str], Any]:
    """What an instance of a subgraph sets inside: (node inside, widget) -> value; ("", name) is an input of its own."""
    values = inner.instance.get("widgets_values")
    properties = inner.instance.get("properties")
    proxies = properties.get("proxyWidgets") if isinstance(properties, dict) else None
    found: dict[tuple[str, str], Any] = {}
    if isinstance(proxies, list) and isinstance(values, list) and len(values) == len(proxies):
        for proxy, value in zip(proxies, values, strict=True):
            if isinstance(proxy, list) and len(proxy) >= 2:
                owner = "" if str(proxy[0]) == "-1" else str(proxy[0])
                found[(owner, str(proxy[1]))] = value
    elif isinstance(values, list) and values and not proxies:
        names = _own_widgets(inner)
        if len(names) == len(values):
            found |= {("", name): value for name, value in zip(names, values, strict=True)}
        else:
            why = f"subgraph {inner.prefix[:-1]} has {len(values)} values for {len(names)} promoted widgets"
            found |= {("", name): Absent(why) for name in names}
    # A widget of this instance may itself be promoted further out.
    found |= {("", widget): value for (owner, widget), value in outer.items() if owner == one}
    return found


def _own_widgets(inner: _Scope) -> list[str]:
    """The inputs of a subgraph that are widgets, in order: those linked to a widget inside."""
    file, found = inner.file, []
    for number, definition in enumerate(_list(inner.graph, "inputs", dict, file)):
        for _, origin, slot, target, index in inner.ends:
            slots = _list(inner.nodes.get(target, {}), "inputs", dict, file)
            if origin == str(_FROM_OUTSIDE) and slot == number and 0 <= index < len(slots) and _widget(slots[index]):
                found.append(str(definition.get("name")))
                break
    return found


def _through(node: Mapping[str, Any], slots: list[Any], slot: int, file: object) -> Any:
    """The input that a bypassed node passes on: of the same place if the types agree, else the first of the type."""
    outputs = _list(node, "outputs", dict, file)
    kind = outputs[slot].get("type") if 0 <= slot < len(outputs) else None
    candidates = [*slots[slot : slot + 1], *slots] if slot >= 0 else []
    return next((one for one in candidates if one.get("type") == kind and one.get("link") is not None), None)


def _widget(slot: Mapping[str, Any]) -> str:
    widget = slot.get("widget")
    return str(widget.get("name")) if isinstance(widget, dict) and widget.get("name") else ""


def _ends(link: Any, file: object) -> tuple[Any, str, int, str, int]:
    """A link's id, the node and output that it comes from, and the node and input that it goes to."""
    if isinstance(link, dict):
        link = [link.get(name) for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
    one, origin, slot, target, number = [*link, *[None] * 5][:5]
    if not isinstance(one, (int, str)) or not all(isinstance(end, (int, str)) for end in (origin, target)):
        raise RecipeError("workflow", "a link is damaged", file=file, found=str(link)[:200])
    return one, str(origin), slot if type(slot) is int else -1, str(target), number if type(number) is int else -1


def _kind(node: Mapping[str, Any], file: object) -> str:
    return str(_get(node, "type", str, file))


def _get(node: Mapping[str, Any], name: str, kind: Any, file: object) -> Any:
    if not isinstance(node.get(name), kind):
        raise RecipeError("workflow", f"a node has no {name}", file=file, found=str(node)[:200])
    return node[name]


def _list(holder: Mapping[str, Any], name: str, kind: Any, file: object) -> list[Any]:
    value = holder.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise RecipeError("workflow", f"{name} is not a list as a workflow has it", file=file, found=str(value)[:200])
    return value
