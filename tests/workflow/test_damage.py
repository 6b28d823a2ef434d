"""Damaged workflows, thousands of them: every one is read or refused, and nothing else happens."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from test_editor import flat, nested, template
from test_translate import CASES, LOADERS, OURS, SAVE

from alkahest.errors import AlkahestError
from alkahest.workflow.graph import read_graph
from alkahest.workflow.translate import recipes_of

ODD = [
    None,
    True,
    -1,
    0,
    4,
    1e308,
    "",
    "1",
    "-10",
    "ModelMergeAdd",
    "inner",
    "Reroute",
    "GetNode",
    [],
    {},
    [[]],
    ["1", 0],
    ["9", 0],
    [None],
    {"link": 1},
    "../x",
    float("nan"),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return found


def damaged(value: Any, chance: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 4)):
        where = places(value)
        if not where:
            break
        holder, key = chance.choice(where)
        act = chance.randrange(4)
        if act == 0:
            del holder[key]
        elif act == 1:
            holder[key] = copy.deepcopy(chance.choice(ODD))
        elif act == 2:  # what stands elsewhere, itself perhaps
            other, name = chance.choice(where)
            holder[key] = copy.deepcopy(other[name])
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
    return value


WORKFLOWS = {
    "flat": flat,
    "nested": nested,
    "template": lambda: template("image_z_image_turbo"),
    "api": lambda: {**LOADERS, **CASES["two differences"][0], "10": SAVE},
    "ours": lambda: {**LOADERS, **OURS["parts"][0], "10": SAVE},
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_damage_is_read_or_refused(name: str) -> None:
    whole, refused = WORKFLOWS[name](), 0
    for seed in range(600):
        value = json.loads(json.dumps(damaged(whole, random.Random(seed))))
        try:
            recipes_of(read_graph(value))
        except AlkahestError:
            refused += 1
    assert 20 < refused < 600
