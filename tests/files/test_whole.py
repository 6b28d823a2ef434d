"""Output that appears whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from alkahest.errors import FileFormatError, OutputError
from alkahest.files import reader as reading
from alkahest.files import whole
from alkahest.files.reader import Reader
from alkahest.files.whole import only_one, whole_file, whole_folder, write_file


@pytest.fixture(params=[True, False], ids=["positional", "fallback"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without preadv and pwrite, which Windows lacks."""
    for module in (whole, reading):
        monkeypatch.setattr(module, "HAS_POSITIONAL", request.param and hasattr(os, "preadv"))


@pytest.mark.usefixtures("_both_ways")
def test_what_is_written_is_read(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.bin", 10) as writer:
        writer.write(b"world", 5)
        writer.write(memoryview(b"hello"), 0)
    assert (tmp_path / "a.bin").read_bytes() == b"helloworld"
    reader = Reader(tmp_path / "a.bin")
    assert (reader.read(3, 4), reader.size) == (b"lowo", 10)
    with pytest.raises(FileFormatError, match="ended early"):
        reader.read(8, 4)


def test_nothing_appears_before_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with whole_file(tmp_path / "a.bin", 3) as writer:
        writer.write(b"new", 0)
        assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_failure_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(error), whole_file(tmp_path / "a.bin", 3):
        raise error
    assert os.listdir(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out", 1) as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x"]
    with pytest.raises(OutputError, match="not empty"), whole_folder(tmp_path / "out", 1):
        pass
    with pytest.raises(ValueError, match="stop"), whole_folder(tmp_path / "two", 1):
        raise ValueError("stop")
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_writer_is_cleaned_up_by_the_next_and_a_running_one_is_not(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from alkahest.files.whole import only_one, whole_file, whole_folder, write_file
        with whole_file(Path(sys.argv[1]) / "a.bin", 5), whole_folder(Path(sys.argv[1]) / "b", 5):
            print("writing", flush=True)
            time.sleep(60)
    """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"writing\n"
    assert len(os.listdir(tmp_path)) == 2
    whole.remove_leftovers(tmp_path)
    assert len(os.listdir(tmp_path)) == 2, "a running writer's files were removed"
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert len(os.listdir(tmp_path)) == 2
    with whole_file(tmp_path / "c.bin", 1):
        pass
    assert os.listdir(tmp_path) == ["c.bin"]
    other.stdout.close()


def test_refuses_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="does not exist"), whole_file(tmp_path / "no" / "a.bin", 1):
        pass
    with pytest.raises(OutputError, match="existing folder"), whole_file(tmp_path, 1):
        pass
    with pytest.raises(OutputError, match=r"(?s)disk is too small.*expected: 1,000,0.*found"):  # noqa: SIM117
        with whole_file(tmp_path / "a.bin", 10**18):
            pass

    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(whole.os, "open", refuse)
    with pytest.raises(OutputError, match=r"(?s)permission denied.*choose a folder"), whole_file(tmp_path / "a.bin", 1):
        pass


def test_a_full_disk_in_the_middle_is_told_and_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole.os, "pwrite", full)
    with pytest.raises(OutputError, match="no space left"), whole_file(tmp_path / "a.bin", 5) as writer:
        writer.write(b"hello", 0)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reserves only there")
def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "require_free", lambda *arguments: None)  # what is free now may not be later
    with (
        pytest.raises(OutputError, match=r"(?s)(no space left|file too large).*a.bin"),
        whole_file(tmp_path / "a.bin", 1 << 62),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_reserves_nothing_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*arguments: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(whole.ctypes, "CDLL", lambda *arguments, **options: SimpleNamespace(fallocate=unsupported))
    with whole_file(tmp_path / "a.bin", 7) as writer:
        writer.write(b"o", 4)
        assert (writer.path).stat().st_size == 7
    assert (tmp_path / "a.bin").read_bytes() == b"\0\0\0\0o\0\0"


def test_a_failed_write_back_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_SYNC_EVERY", 4)
    calls = []

    def sync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(whole.os, "fsync", sync)
    with pytest.raises(OutputError, match="input/output error"), whole_file(tmp_path / "a.bin", 5) as writer:
        writer.write(b"hello", 0)
        deadline = time.monotonic() + 10
        while not calls and time.monotonic() < deadline:
            time.sleep(0.01)
    assert os.listdir(tmp_path) == []


def test_the_longest_names_work(tmp_path: Path) -> None:
    target = tmp_path / ("ア" * 80 + "." + "x" * 14)
    with whole_file(target, 1) as writer:
        writer.write(b"1", 0)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    with pytest.raises(OutputError, match="too long"), whole_file(tmp_path / ("x" * 300), 1):
        pass


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "soft").symlink_to(tmp_path / "a")
    with whole_file(tmp_path / "soft", 1) as writer:
        writer.write(b"2", 0)
    assert (tmp_path / "soft").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"2"


@pytest.mark.parametrize("through", ["itself", "a link"])
def test_an_output_is_a_regular_file_or_nothing(through: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    target = pipe
    if through == "a link":
        target = tmp_path / "link.safetensors"
        target.symlink_to(pipe)
    with pytest.raises(OutputError, match=r"(?s)not a regular file.*a pipe"):
        write_file(target, b"x")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    device = tmp_path / "null.safetensors"
    device.symlink_to("/dev/null")
    with pytest.raises(OutputError, match=r"(?s)not a regular file.*a device|not allowed|Permission"):
        write_file(device, b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_links_that_lead_nowhere_do_not_stop_a_save(tmp_path: Path) -> None:
    (tmp_path / ".x.alkahest-partial").symlink_to(tmp_path / "gone")
    write_file(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    assert (tmp_path / ".x.alkahest-partial").is_symlink()


def test_saves_side_by_side_do_not_clear_each_other_away(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from alkahest.files.whole import write_file\n"
        "for n in range(60): write_file(Path(sys.argv[1]) / f'{sys.argv[2]}-{n}', b'x' * 1000)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(n)]) for n in range(4)]
    assert [one.wait() for one in running] == [0] * 4
    assert len(list(tmp_path.iterdir())) == 240
    assert all(path.stat().st_size == 1000 for path in tmp_path.iterdir())


def test_a_folder_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path / "run", "finetune"):
        program = (
            "import sys; from pathlib import Path; from alkahest.files.whole import only_one\n"
            "with only_one(Path(sys.argv[1]), 'finetune'): pass\n"
        )
        second = [sys.executable, "-c", program, str(tmp_path / "run")]
        refused = subprocess.run(second, capture_output=True, text=True)
        assert "another process is at work in this folder" in refused.stderr
    assert subprocess.run(second, check=True).returncode == 0
