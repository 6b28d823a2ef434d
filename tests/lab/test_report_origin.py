from __future__ import annotations

from pathlib import Path

import blake3
import pytest
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.engine.events import result_of
from alkahest.lab.report_origin import Origin, stream_origin
from alkahest.measure.measured_table import SHOWN
from alkahest.measure.table import COLUMNS


def test_every_file_with_its_role_size_form_and_hash(trio: dict[str, Path], tmp_path: Path) -> None:
    sharded = ak.open(trio["base"]).save(tmp_path / "shards", max_shard_size="500KB")
    models = {"variant": ak.open(trio["variant"]), "base": ak.open(sharded.path), "bridge": ak.mini.load("tb1")}
    found: Origin = result_of(stream_origin(models, "alkahest diff <a> b"))
    paths = [trio["variant"], *sorted(sharded.files), ak.mini.load("tb1").path]
    assert sorted(one.blake3 for one in found.files) == sorted(blake3.blake3(p.read_bytes()).hexdigest() for p in paths)
    assert {one.name: one.nbytes for one in found.files} == {p.name: p.stat().st_size for p in paths}
    assert [one.role for one in found.files] == ["variant", *["base"] * len(sharded.files), "bridge"]
    assert found.files[0].form == "bf16; native"
    assert found.small == ("bridge",)
    text = found.as_html()
    assert "Miniatures" in text
    assert "alkahest diff &lt;a&gt; b" in text
    assert "Miniatures" not in result_of(stream_origin({"base": models["variant"]}, "x")).as_html()


@pytest.mark.parametrize(
    ("line", "roles"),
    [
        (("diff", "VARIANT", "BASE", "--on", "BRIDGE"), ("variant", "base", "on")),
        (("multiplier", "VARIANT", "BASE", "--on", "BRIDGE"), ("variant", "base", "on")),
        (("check", "VARIANT", "BASE", "--bridge", "BRIDGE"), ("variant", "base", "bridge")),
    ],
    ids=lambda line: line[0],
)
def test_each_report_can_be_sent(
    line: tuple[str, ...],
    roles: tuple[str, ...],
    trio: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [str(trio[word.lower()]) if word.lower() in trio else word for word in line]
    words += ["--html", str(tmp_path / "r.html"), "-q"]
    monkeypatch.setattr("sys.argv", ["alkahest", *words])
    result = CliRunner().invoke(app, words)
    assert result.exit_code in (0, 1), result.output
    text = (tmp_path / "r.html").read_text()
    for role, path in zip(roles, (trio["variant"], trio["base"], trio["bridge"]), strict=True):
        assert f"<td>{role}</td><td>{path.name}</td>" in text
        assert blake3.blake3(path.read_bytes()).hexdigest() in text
    assert f"Alkahest {ak.__version__}: <code>alkahest {line[0]} {words[1]} " in text
    for name in set(SHOWN) & set(COLUMNS):
        assert f"<dt>{SHOWN[name][0]}</dt>" in text
