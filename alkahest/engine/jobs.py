"""The jobs that fill one output file: compute and round, or copy byte for byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import torch

from alkahest.engine.evaluate import evaluate
from alkahest.engine.plan import Carried, Constant, Item, Piece, Weight
from alkahest.engine.readable import Workspace
from alkahest.engine.terms import needs_whole_tensor
from alkahest.engine.workers import Job, Run, blocks, place_of
from alkahest.model.dtypes import FORMATS, Format, decode, scale_for

_COPY = 4 << 20  # bytes


class Sink(Protocol):
    """Where bytes go: a `Writer`, or something that compares them with a file."""

    def write(self, data: memoryview | bytes, offset: int) -> None: ...


def jobs_of(run: Run, writer: Sink, data_start: int, items: list[Item]) -> Iterator[Job]:
    """One job for every block of every tensor; scaled tensors are one job each, for their scale."""
    offsets, offset = {}, data_start
    for item in items:
        offsets[item.name] = offset
        offset += item.nbytes
    for item in items:
        start = offsets[item.name]
        match item:
            case Carried():
                yield from _carry(item, writer, start)
            case Constant():
                if item.data:
                    yield Job(item.name, item.nbytes, _constant(item.data, writer, start))
            case Weight(scale_name=str(scale_name)):
                work = _work_on_scaled(run, writer, item, start, offsets[scale_name])
                yield Job(item.name, item.nbytes + 4, work, place_of(item.pieces[0].term, otherwise=(0, start)))
            case Weight():
                for piece in item.pieces:
                    yield from _plain(run, writer, item.form, piece, start)
                    start += piece.elements * item.form.itemsize


def _plain(run: Run, writer: Sink, form: Format, piece: Piece, offset: int) -> Iterator[Job]:
    size = form.itemsize
    for start, stop in blocks(piece.term, piece.elements):
        work = _plain_block(run, writer, form, piece, start, stop, offset + start * size)
        # What is in no file is computed in the order of the output: a neighbour's block may come from the same work.
        yield Job(piece.key, (stop - start) * size, work, place_of(piece.term, start, (0, offset + start * size)))


def _plain_block(
    run: Run, writer: Sink, form: Format, piece: Piece, start: int, stop: int, offset: int
) -> Callable[[Workspace], None]:
    def work(workspace: Workspace) -> None:
        if piece.copied is not None:
            run.nothing_changed &= piece.before is None  # another file's tensor in its place
            _copy(run, workspace, writer, form, piece, start, stop, offset)
            return
        with workspace.raw((stop - start) * form.itemsize, offset) as raw:
            out = raw.view(form.torch)
            run.compute(piece.term, piece.key, start, stop, workspace, out)
            if run.nothing_changed and piece.before is not None:
                run.note_change(piece.before, piece.key, start, stop, workspace, out)
            writer.write(_bytes(raw), offset)

    return work


def _work_on_scaled(
    run: Run, writer: Sink, item: Weight, offset: int, scale_offset: int
) -> Callable[[Workspace], None]:
    ranges = [(piece, start, stop) for piece in item.pieces for start, stop in blocks(piece.term, piece.elements)]

    def largest(workspace: Workspace) -> float:
        found = 0.0
        for piece, start, stop in ranges:
            with _values(run, workspace, piece, start, stop) as values:
                run.check(values, piece.key, FORMATS["fp32"], piece.term)
                finite = values.nan_to_num(0, 0, 0) if run.options.allow_nonfinite else values
                found = max(found, float(finite.abs().max()))
        return found

    def work(workspace: Workspace) -> None:
        # The largest magnitude decides the scale, so what is not copied is computed twice.
        scale = item.scale if item.scale is not None else scale_for(largest(workspace), item.form)
        position = offset
        for piece, start, stop in ranges:
            if piece.copied is not None:
                _copy(run, workspace, writer, item.form, piece, start, stop, position)
            else:
                with (
                    _values(run, workspace, piece, start, stop) as values,
                    workspace.raw(stop - start, position) as raw,
                ):
                    values.div_(scale).clamp_(-item.form.largest, item.form.largest)
                    out = raw.view(item.form.torch)
                    run.round(values, piece.key, start, out)
                    if run.nothing_changed and piece.before is not None:
                        original = replace(piece, term=piece.before)
                        with _values(run, workspace, original, start, stop) as before:
                            before.div_(scale).clamp_(-item.form.largest, item.form.largest)
                            rounded = torch.empty_like(out)
                            run.round(before, piece.key, start, rounded)
                        run.tell_apart(rounded, out)
                    writer.write(_bytes(raw), position)
            position += stop - start
        writer.write(_bytes(torch.tensor([scale], dtype=torch.float32)), scale_offset)

    return work


def _copy(
    run: Run, workspace: Workspace, writer: Sink, form: Format, piece: Piece, start: int, stop: int, offset: int
) -> None:
    assert piece.copied is not None
    place, count = piece.copied.offset + start * form.itemsize, (stop - start) * form.itemsize
    with workspace.raw(count, place) as raw, workspace.block(stop - start) as values:
        piece.copied.stored.reader.read_into(raw.numpy().data, place)
        decode(raw, form, values)
        run.check(values, piece.key, form, piece.term)
        writer.write(_bytes(raw), offset)


@contextlib.contextmanager
def _values(run: Run, workspace: Workspace, piece: Piece, start: int, stop: int) -> Iterator[torch.Tensor]:
    turn = run.whole_tensor if needs_whole_tensor(piece.term) else contextlib.nullcontext()
    with turn, workspace.block(stop - start) as values:
        evaluate(piece.term, start, stop, values, workspace)
        yield values


def _carry(item: Carried, writer: Sink, offset: int) -> Iterator[Job]:
    for start in range(0, item.nbytes, _COPY):
        count = min(_COPY, item.nbytes - start)

        def work(workspace: Workspace, start: int = start, count: int = count) -> None:
            with workspace.raw(count, item.entry.offset + start) as raw:
                item.reader.read_into(raw.numpy().data, item.entry.offset + start)
                writer.write(_bytes(raw), offset + start)

        yield Job(item.name, count, work, (0, item.entry.offset + start))


def _constant(data: bytes, writer: Sink, offset: int) -> Callable[[Workspace], None]:
    return lambda workspace: writer.write(data, offset)


def _bytes(values: torch.Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data
