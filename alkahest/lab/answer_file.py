"""Answers of a blind comparison as a file: a row a pair, written whole after each, read back to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from alkahest.errors import AlkahestError, FileFormatError, OutputError
from alkahest.files.paths import expanded
from alkahest.files.whole import write_text
from alkahest.lab.candidates import Candidate
from alkahest.pictures.preferences import ANSWERS, PreferenceOrder

COLUMNS = (
    "left",
    "right",
    "answer",
    "prompt",
    "seed",
    "settings",
    "left_recipe",
    "right_recipe",
    "left_point",
    "right_point",
)


class AnswerFile:
    """Rows of answers at a path, and the order that they give beside it.

    >>> AnswerFile("answers.csv").path, AnswerFile("answers.csv").order_path
    (PosixPath('answers.csv'), PosixPath('answers-order.csv'))
    """

    def __init__(self, file: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = expanded(file, "blind_comparison")
        if self.path.suffix != ".csv":
            raise OutputError(
                "blind_comparison", "answers are a .csv file", file=self.path, fix=str(self.path.with_suffix(".csv"))
            )
        self.order_path = self.path.with_name(f"{self.path.stem}-order.csv")
        self._has_order = False  # written by this one
        self.settings = json.dumps(settings, sort_keys=True)
        self.rows = self._read() if self.path.exists() else pd.DataFrame(columns=list(COLUMNS))

    def add(self, left: Candidate, right: Candidate, answer: str, prompt: str, seed: int) -> None:
        """A row more, and the file anew."""
        values = [left.name, right.name, answer, prompt, seed, self.settings, left.recipe, right.recipe]
        row = dict(zip(COLUMNS, [*values, json.dumps(left.point), json.dumps(right.point)], strict=True))
        self.rows = pd.DataFrame([*self.rows.to_dict("records"), row], columns=list(COLUMNS))
        self._write()

    def take_back(self) -> dict[str, Any]:
        """The last row, which is in the file no more."""
        row: dict[str, Any] = self.rows.iloc[-1].to_dict()
        self.rows = self.rows.iloc[:-1]
        self._write()
        return row

    def write_order(self, order: PreferenceOrder | None) -> None:
        """The order beside the answers; None takes back one that was written, as its answers were."""
        if order is not None:
            write_text(self.order_path, order.table.to_csv(index=False))
        elif self._has_order:
            self.order_path.unlink(missing_ok=True)
        self._has_order = order is not None

    def points(self) -> list[dict[str, Any]]:
        """The points of the recipes in it, in the order in which they were asked."""
        texts = [text for row in self.rows.itertuples() for text in (row.left_point, row.right_point)]
        return [json.loads(text) for text in dict.fromkeys(texts)]

    def require_same(self, known: Mapping[str, Candidate]) -> None:
        """Raise OutputError if its answers are of other recipes or settings than these."""
        for row in self.rows.itertuples():
            for name, recipe in ((row.left, row.left_recipe), (row.right, row.right_recipe)):
                here = known[name].recipe if name in known else "no such recipe"
                if here != recipe:
                    self._refuse(f"{name}: {here}", f"{name}: {recipe}")
            if row.settings != self.settings:
                self._refuse(self.settings, row.settings)

    def _refuse(self, expected: str, found: str) -> None:
        raise OutputError(
            "blind_comparison",
            "the file holds answers to other pictures",
            file=self.path,
            expected=expected,
            found=found,
            fix="file='another.csv', or ask the same as then",
        )

    def _write(self) -> None:
        write_text(self.path, self.rows.to_csv(index=False))

    def _read(self) -> pd.DataFrame:
        try:
            rows = pd.read_csv(self.path, dtype=str, keep_default_na=False)
            if tuple(rows.columns) != COLUMNS:
                raise ValueError(f"columns {', '.join(map(str, rows.columns))}"[:200])
            if wrong := [answer for answer in rows.answer if answer not in ANSWERS]:
                raise ValueError(f"the answer {wrong[0]!r}")
            rows["seed"] = rows.seed.astype(int)
            for text in [*rows.left_point, *rows.right_point]:
                if not isinstance(json.loads(text), dict):
                    raise ValueError("a point that is none")
        except (ValueError, OSError, RecursionError, AlkahestError) as error:
            raise FileFormatError(
                "blind_comparison",
                "these are no answers of a blind comparison",
                file=self.path,
                found=str(error),
                fix="file='another.csv'",
            ) from None
        return rows
