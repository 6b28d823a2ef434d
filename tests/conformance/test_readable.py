"""One suite for everything that can be read: see `alkahest.engine.readable.Readable`."""

from __future__ import annotations

import math
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conformance.readables import CASES, Case, Q

from alkahest.engine.readable import Readable, Workspace
from alkahest.engine.terms import Source
from alkahest.engine.workers import why_nonfinite
from alkahest.errors import FileFormatError, NonFiniteError
from alkahest.model.dtypes import STORAGES, decode
from alkahest.model.packed import PACKED


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp("readable"))


def read(readable: Readable, key: str, start: int, stop: int) -> torch.Tensor:
    """A block, between guards that it must not touch."""
    around = torch.full((stop - start + 2,), torch.nan)
    readable.read(key, start, stop, around[1:-1], Workspace(torch.device("cpu")))
    assert around[[0, -1]].isnan().all(), "what was not asked for was written"
    return around[1:-1]


def whole(readable: Readable, key: str) -> torch.Tensor:
    return read(readable, key, 0, math.prod(readable.shapes[key]))


def test_numbers_are_the_ones_that_are_there(case: Case) -> None:
    assert set(case.values) <= set(case.readable.shapes)
    for key, value in case.values.items():
        assert case.readable.shapes[key] == tuple(value.shape), key
        torch.testing.assert_close(whole(case.readable, key), value.float().flatten(), rtol=2e-6, atol=1e-6, msg=key)


def test_any_block_is_that_part_of_the_whole(case: Case) -> None:
    draw = random.Random(3)
    for key in case.values:
        everything = whole(case.readable, key)
        count = len(everything)
        bounds = [(0, 1), (count - 1, count), (7, 7), *(sorted(draw.sample(range(count + 1), 2)) for _ in range(4))]
        for start, stop in bounds:
            assert torch.equal(read(case.readable, key, start, stop), everything[start:stop]), (key, start, stop)


def test_workers_may_read_at_once(case: Case) -> None:
    draw = random.Random(4)
    keys = list(case.values)
    expected = {key: whole(case.readable, key) for key in keys}
    asked = [(key, *sorted(draw.sample(range(len(expected[key]) + 1), 2))) for key in draw.choices(keys, k=200)]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda one: read(case.readable, *one), asked)
    for (key, start, stop), block in zip(asked, found, strict=True):
        assert torch.equal(block, expected[key][start:stop]), (key, start, stop)


def test_what_is_stored_lies_where_it_says(case: Case) -> None:
    for key in case.values:
        held = case.readable.stored(key)
        if held is None:
            continue
        assert held.stored.reader in case.readable.files
        assert held.shape == case.readable.shapes[key]
        assert held.elements == math.prod(held.shape)
        raw = torch.frombuffer(bytearray(held.stored.reader.read(held.offset, held.nbytes)), dtype=torch.uint8)
        values = torch.empty(held.elements)
        decode(raw, held.stored.form, values, held.stored.scale)
        assert torch.equal(values, whole(case.readable, key)), key
        if held.is_bf16:
            with case.readable.bits(key, 5, min(50, held.elements), Workspace(torch.device("cpu"))) as bits:
                as_numbers = torch.from_numpy(bits.copy()).view(torch.bfloat16).float()
            assert torch.equal(as_numbers, values[5:50]), key


def test_storage_is_named_as_everywhere(case: Case) -> None:
    assert set(case.readable.storage) <= set(case.readable.shapes)
    assert set(case.readable.storage.values()) <= {*STORAGES, *PACKED}


def test_finite_numbers_pass_and_others_are_told_by_name(case: Case) -> None:
    for key in case.values:
        case.readable.check_finite(key, "save")
    broken = case.broken()
    with pytest.raises(NonFiniteError, match="NaN or infinity") as caught:
        broken.check_finite(Q, "save")
    assert (caught.value.operation, "NaN" in caught.value.problem) == ("save", True)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        raise why_nonfinite(Source(broken, Q), Q)
    assert isinstance(why_nonfinite(Source(case.readable, Q), Q), NonFiniteError), "then it was the arithmetic"


def test_files_have_the_names_that_recipes_record(case: Case) -> None:
    assert set(case.readable.file_names) == set(case.readable.files) or not case.readable.file_names
    assert case.readable.name.isidentifier()
    assert isinstance(hash(case.readable), int)
    assert case.readable == case.readable


def test_another_process_reads_the_same(case: Case, tmp_path: Path) -> None:
    if not case.is_sent:
        return
    again = pickle.loads(pickle.dumps(case.readable))
    assert torch.equal(whole(again, Q), whole(case.readable, Q))
    if case.readable.files:
        assert again == case.readable
        assert hash(again) == hash(case.readable)


@pytest.mark.parametrize("fault", ["truncated", "removed", "changed", "times put back"])
@pytest.mark.parametrize("name", CASES)
def test_a_file_that_changes_while_it_is_read(name: str, fault: str, tmp_path: Path) -> None:
    """No signal, no numbers of another file: what was read, or an error that names the file."""
    case = CASES[name](tmp_path)
    readable = case.readable
    before = {key: whole(readable, key) for key in case.values}  # files are open from now on
    for reader in readable.files:
        path, status = reader.path, reader.path.stat()
        match fault:
            case "truncated":
                os.truncate(path, 16)
            case "removed":
                path.unlink()
            case _:
                with path.open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    last = file.read(1)
                    file.seek(-1, os.SEEK_END)
                    file.write(bytes([last[0] ^ 1]))
                if fault == "times put back":
                    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for key, numbers in before.items():
        try:
            found = whole(readable, key)
        except FileFormatError as error:
            assert fault == "truncated"
            assert error.file in {str(reader.path) for reader in readable.files}
        else:
            assert fault in ("changed", "times put back") or torch.equal(found, numbers)
    for reader in readable.files:
        with pytest.raises(FileFormatError, match="changed after it was opened"):
            reader.check_unchanged()
