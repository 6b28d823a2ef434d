"""Where a report comes from: its files with their hashes, sizes and forms, the command, the date and the version."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from alkahest.engine.events import Event
from alkahest.engine.record import stream_hashes
from alkahest.files.paths import recorded_name
from alkahest.mini.shipped import WEIGHTS
from alkahest.sources.checkpoint import Checkpoint
from alkahest.version import __version__


@dataclass(frozen=True)
class File:
    """One file of a checkpoint, and what the checkpoint was for in this report."""

    role: str
    name: str
    nbytes: int
    form: str
    blake3: str


@dataclass(frozen=True)
class Origin:
    """What `stream_origin` found."""

    files: tuple[File, ...]
    command: str
    date: str
    small: tuple[str, ...]  # the roles that miniatures have

    def as_html(self) -> str:
        """All of it as HTML, each file a row."""
        heads = "".join(f"<th>{head}</th>" for head in ("", "file", "bytes", "form", "BLAKE3"))
        rows = [
            f"<tr><td>{_text(one.role)}</td><td>{_text(one.name)}</td><td>{one.nbytes:,}</td><td>{_text(one.form)}</td>"
            f"<td><code>{one.blake3}</code></td></tr>"
            for one in self.files
        ]
        minis = (
            f"<p>Miniatures, small models of the family that Alkahest ships: {_text(', '.join(self.small))}. What they "
            "show need not hold for models of full size.</p>"
            if self.small
            else ""
        )
        return (
            f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>{minis}"
            f"<p>{self.date}, Alkahest {__version__}: <code>{_text(self.command)}</code></p>"
        )


def stream_origin(models: Mapping[str, Checkpoint], command: str) -> Iterator[Event]:
    """Hash the files of checkpoints, each named by its role; the last event has the `Origin`.

    Hashes that are known already are not computed again.
    """
    given = [(role, one, reader) for role, one in models.items() for reader in one.files]
    total = sum(reader.size for *_, reader in given)
    hashes = yield from stream_hashes([reader for *_, reader in given], total)
    forms = {role: f"{', '.join(one.summary()['storage'])}; {one.layout}" for role, one in models.items()}
    files = tuple(
        File(role, recorded_name(reader.path), reader.size, forms[role], hashes[reader]) for role, _, reader in given
    )
    small = tuple(role for role, one in models.items() if Path(one.path).resolve().is_relative_to(WEIGHTS.resolve()))
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    yield Event(total, total, "", Origin(files, command, date, small))


def _text(text: str) -> str:
    return html.escape(text, quote=False)
