from __future__ import annotations

import pickle
from html.parser import HTMLParser

import pandas as pd
import pytest

import alkahest as ak
from alkahest.measure.measured_table import SHOWN, MeasuredTable, readable_html, small_html
from alkahest.measure.table import COLUMNS


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return ak.delta_table(ak.mini.load("base-variant") - ak.mini.load("base"))


class Cells(HTMLParser):
    """What the cells of a table say, a row each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._within = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._within = True

    def handle_data(self, data: str) -> None:
        if self._within:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._within = False


def test_a_tensor_is_one_readable_line(table: pd.DataFrame) -> None:
    head, *rows = Cells(table._repr_html_()).rows
    assert len(rows) == len(table)
    assert head[:2] == ["tensor", "relative, % of the weights' norm"]
    assert "relative, % of the weights' norm" in head
    assert all(len(cell) < 60 for row in rows for cell in row)
    number = next(n for n, name in enumerate(table.tensor) if name == "layers.0.feed_forward.w2.weight")
    row = dict(zip(head, rows[number], strict=True))
    assert row["relative, % of the weights' norm"] == f"{100 * table.relative[number]:.3g} %"
    assert row["shape"] == " x ".join(map(str, table["shape"][number]))
    assert row["elements"] == f"{table.elements[number]:,}"


def test_the_longest_bar_is_the_largest_change(table: pd.DataFrame) -> None:
    text = table._repr_html_()
    assert text.count("#0072b255 100.0%") == 1
    largest = table.tensor[table.relative.idxmax()]
    (row,) = (line for line in text.split("<tr>") if "#0072b255 100.0%" in line)
    assert largest in row


def test_what_is_not_shown_is_named_and_there(table: pd.DataFrame) -> None:
    text = readable_html(table)
    assert "also in the table: " in text
    for name in ("ulps", "ulp_energy", "gap"):
        assert name in text.rpartition("also in the table: ")[2]
        assert name in table.columns
    assert "ulps" in repr(table)
    assert len(max(repr(ak.rolled_up(table)).splitlines()[:-1], key=len)) < 250
    assert [name for name in COLUMNS if name in SHOWN]


def test_columns_that_a_person_picks_are_pandas_own(table: pd.DataFrame) -> None:
    few = table[["tensor", "relative"]].round(3)
    plain = pd.DataFrame(few)
    assert repr(few) == repr(plain)
    assert few._repr_html_() == plain._repr_html_()


def test_it_is_a_dataframe_like_any_other(table: pd.DataFrame) -> None:
    assert type(table) is type(ak.rolled_up(table)) is type(table[table.relative > 0]) is MeasuredTable
    assert ak.rolled_up(table).attrs["of"] == table.attrs["of"]
    again = pickle.loads(pickle.dumps(table))
    pd.testing.assert_frame_equal(again, table)
    assert readable_html(again) == readable_html(table)
    assert isinstance(table.groupby("part").relative.max(), pd.Series)


def test_long_tables_say_where_they_stop(table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alkahest.measure.measured_table._MOST", 5)
    text = readable_html(table)
    assert len(Cells(text).rows) == 6
    assert f"the first 5 of {len(table):,} rows" in text


def test_nothing_of_a_file_becomes_html(table: pd.DataFrame) -> None:
    strange = table.head(2).assign(tensor=["<script>alert(1)</script>", "a&b"])
    strange.attrs["of"] = "<b>"
    text = readable_html(strange)
    assert "<script>" not in text
    assert "<b>" not in text
    assert "a&amp;b" in text


def test_small_tables_have_the_same_look() -> None:
    text = small_html(pd.DataFrame({"part": ["a<b", "all"], "k_of_it": [171.123456, float("nan")], "n": [3, 4]}))
    assert Cells(text).rows == [["part", "k of it", "n"], ["a<b", "171.1", "3"], ["all", "-", "4"]]
    assert "a&lt;b" in text
    k = ak.needed_multiplier(ak.mini.load("base-weak") - ak.mini.load("base"))
    rows = Cells(k._repr_html_()).rows
    assert ["survival", f"{k.bases['survival']:.4g}"] in rows
    assert all("NaN" not in cell for row in rows for cell in row)
