"""Work shared out to other processes: pools, and dask.distributed with a worker that is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import alkahest as ak
from alkahest.errors import FileFormatError, NonFiniteError, OutputError
from alkahest.pictures.sweeps import stream_sweep

LAYER = "layers.1.feed_forward.w2.weight"
FAST = {"steps": 2, "width": 24, "height": 40}
OVER = {"k": [0, 1, 2, 4, 9.5], "cfg": [1, 2]}
Models = tuple[ak.Checkpoint, ak.Checkpoint, ak.Checkpoint]


@pytest.fixture
def models(trio: dict[str, Path]) -> Models:
    return tuple(ak.open(trio[name]) for name in ("bridge", "variant", "base"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from distributed import LocalCluster

    folder = str(tmp_path_factory.mktemp("dask"))
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        host="127.0.0.1",
        local_directory=folder,
        silence_logs="ERROR",
    ) as made:
        yield made


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


class DyingOnce(Executor):
    """An executor whose first task kills its worker when its work is done, but not yet reported."""

    def __init__(self, inner: Executor, flag: Path) -> None:
        self.inner, self.flag = inner, str(flag)

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        flag = self.flag

        def task(*arguments: Any) -> Any:
            result = function(*arguments)
            try:
                os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return result
            os.kill(os.getpid(), signal.SIGKILL)

        return self.inner.submit(task, *arguments, **named)


def with_one(path: Path, number: float) -> ak.Checkpoint:
    """A checkpoint with one number of `LAYER` replaced."""
    state = tiny.state(seed=1)
    state = {**state, LAYER: state[LAYER].clone()}
    state[LAYER][2, 3] = number
    return ak.open(tiny.write(path, tiny.native(state)))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- merges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "comfy_quant"])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_merge_by_processes_is_the_serial_one(
    dtype: str, layout: str, models: Models, processes: Executor, tmp_path: Path
) -> None:
    bridge, variant, base = models
    merged = bridge.protect("refiner") + 3 * (variant - base)
    options: dict[str, Any] = {"dtype": dtype, "layout": layout, "max_shard_size": "0.4MB", "threads": 1}
    serial = merged.save(tmp_path / "serial", **options)
    spread = merged.save(tmp_path / "spread", executor=processes, **options)
    assert len(serial.files) > 3
    assert files_of(tmp_path / "serial") == files_of(tmp_path / "spread")
    assert (spread.nbytes, spread.computed, spread.copied, spread.recipe) == (
        serial.nbytes,
        serial.computed,
        serial.copied,
        serial.recipe,
    )
    assert [path.name for path in spread.files] == [path.name for path in serial.files]
    assert ak.open(tmp_path / "spread").shapes == bridge.shapes


def test_events_add_up_shard_by_shard(models: Models, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        events = list(models[0].stream(tmp_path / "out", max_shard_size="0.5MB", executor=pool))
    shards = [event for event in events if event.key.startswith("model-")]
    assert len(shards) == len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert [event.done for event in shards] == sorted(event.done for event in shards)
    assert (
        events[-1].done
        == events[-1].total
        == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    )


def test_a_failure_elsewhere_is_told_here_and_nothing_is_left(
    models: Models, processes: Executor, tmp_path: Path
) -> None:
    bridge, variant, _ = models
    broken = with_one(tmp_path / "nan.safetensors", torch.nan)
    merged = bridge + 3 * (variant - broken)
    with pytest.raises(NonFiniteError, match=r"(?s)input holds NaN.*nan.safetensors.*layers.1") as caught:
        merged.save(tmp_path / "out", executor=processes, max_shard_size="0.4MB")
    assert caught.value.key == LAYER
    counted = merged.save(tmp_path / "out", executor=processes, max_shard_size="0.4MB", allow_nonfinite=True)
    assert counted.nonfinite == {LAYER: 1}
    tiny.write(tmp_path / "nan.safetensors", tiny.native(tiny.state(seed=1)))  # of the same size, but another file
    with pytest.raises(FileFormatError, match="changed after it was opened"):
        merged.save(tmp_path / "out2", executor=processes, max_shard_size="0.4MB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.safetensors", "out"]


def test_one_file_is_no_work_for_many(models: Models, tmp_path: Path) -> None:
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(OutputError, match=r"(?s)an executor writes shards.*max_shard_size"),
    ):
        models[0].save(tmp_path / "out.safetensors", executor=pool)
    assert not list(tmp_path.iterdir())


def test_a_merge_that_is_stopped_leaves_nothing(models: Models, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        events = models[0].stream(tmp_path / "out", max_shard_size="0.2MB", executor=pool)
        assert next(event for event in events if event.done).done < 2_000_000
        events.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")  # of a worker's loss, which is what is tested
def test_a_merge_survives_the_death_of_a_worker(models: Models, cluster: Any, tmp_path: Path) -> None:
    from distributed import Client

    bridge, variant, base = models
    merged = bridge.protect("refiner") + 3 * (variant - base)
    merged.save(tmp_path / "serial", max_shard_size="0.4MB")
    with Client(cluster) as client:
        merged.save(
            tmp_path / "spread", max_shard_size="0.4MB", executor=DyingOnce(client.get_executor(), tmp_path / "died")
        )
    assert (tmp_path / "died").exists()
    assert files_of(tmp_path / "serial") == files_of(tmp_path / "spread")


# --- extractions -----------------------------------------------------------------------------------


def test_an_extraction_by_processes_is_the_serial_one(
    models: Models, processes: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alkahest.lora import extract

    monkeypatch.setattr(extract, "_TASK", 100_000)
    _, variant, base = models
    asked: dict[str, Any] = {"energy": 0.9, "exclude": "refiner", "full": "layers.0.ffn_norm1", "threads": 1}
    serial = ak.extract_lora(variant - base, **asked)
    written = serial.save(tmp_path / "serial.safetensors")
    spread = ak.extract_lora(variant - base, executor=processes, **asked)
    assert spread.report.drop(columns="ulps", errors="ignore").equals(serial.report)
    assert spread.recipe == serial.recipe
    assert spread.save(tmp_path / "spread.safetensors").path.read_bytes() == written.path.read_bytes()


def test_an_extraction_goes_on_where_another_process_was_stopped(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alkahest.lora import extract

    monkeypatch.setattr(extract, "_TASK", 1)
    _, variant, base = models
    with ThreadPoolExecutor(1) as pool:
        events = extract.stream_extract_lora(variant - base, rank=3, threads=1, executor=pool)
        for _ in range(60):
            last = next(events)
        events.close()
    assert 0 < last.done < last.total
    kept = len(ak.cached().query("kind == 'extractions'"))
    asked: list[str] = []
    real = extract.extract_tensors
    monkeypatch.setattr(extract, "extract_tensors", lambda *given: asked.extend(given[2]) or real(*given))
    with ThreadPoolExecutor(1) as pool:
        found = ak.extract_lora(variant - base, rank=3, threads=1, executor=pool)
    assert 0 < kept < len(found.pairs)
    assert len(set(asked) & set(found.pairs)) == len(found.pairs) - kept


def test_an_error_of_an_extraction_is_told_here(models: Models, processes: Executor, tmp_path: Path) -> None:
    _, _, base = models
    broken = with_one(tmp_path / "inf.safetensors", torch.inf)
    with pytest.raises(NonFiniteError, match=r"(?s)extract_lora.*inf.safetensors"):
        ak.extract_lora(broken - base, executor=processes, threads=1)


@pytest.mark.filterwarnings("ignore")  # of a worker's loss, which is what is tested
def test_an_extraction_survives_the_death_of_a_worker(
    models: Models, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client

    from alkahest.lora import extract

    monkeypatch.setattr(extract, "_TASK", 200_000)
    _, variant, base = models
    serial = ak.extract_lora(variant - base, rank=4, threads=1).save(tmp_path / "serial.safetensors")
    with Client(cluster) as client:
        executor = DyingOnce(client.get_executor(), tmp_path / "died")
        spread = ak.extract_lora(variant - base, rank=4, threads=1, executor=executor).save(
            tmp_path / "spread.safetensors"
        )
    assert (tmp_path / "died").exists()
    assert spread.path.read_bytes() == serial.path.read_bytes()


# --- sweeps ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of a worker's loss, which is what is tested
def test_a_sweep_survives_the_death_of_a_worker(
    models: Models, parts: dict[str, Any], cluster: Any, tmp_path: Path
) -> None:
    from distributed import Client

    tiny.reference(tiny.model(0), parts).save_pretrained(tmp_path / "components")
    bridge, variant, base = models
    live = ak.LiveModel(bridge.protect("refiner") + ak.param("k", 1.0) * (variant - base), tmp_path / "components")
    serial = ak.sweep(live, ["a tree", "a box"], OVER, folder=tmp_path / "serial", **FAST)
    with Client(cluster) as client:
        seen: Counter[str] = Counter()
        table = None
        for event in stream_sweep(
            live,
            ["a tree", "a box"],
            OVER,
            folder=tmp_path / "cluster",
            executor=client.get_executor(),
            batch=2,
            **FAST,
        ):
            if event.result is not None:
                table = event.result
                break
            seen[event.key] += 1
            if sum(seen.values()) == 2:
                os.kill(next(iter(cluster.workers.values())).process.pid, signal.SIGKILL)
    assert table is not None
    assert len(seen) == 20
    assert set(seen.values()) == {1}, "a cell was lost or doubled"
    assert list(table.k) == list(serial.k)
    assert table.error.isna().all()
    assert len(set(table.path)) == 20 == len(list((tmp_path / "cluster").glob("*.png")))
    for one, two in zip(serial.path, table.path, strict=True):
        assert np.abs(np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(two))).max() <= 1
