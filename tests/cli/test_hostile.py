"""Strangers' files at the command line: nothing of theirs steers a terminal, costs without bound, or ends in a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.errors import AlgebraError, AlkahestError, FileFormatError, UnsupportedError

EVIL = "\x1b]0;owned\x07\x1b[31m\u202egpj\x9b2J"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def assert_clean(text: str) -> None:
    bad = [c for c in text if not (c.isprintable() or c in "\n\t\r")]
    assert not bad, bad


@pytest.fixture
def evil(tmp_path: Path) -> dict[str, Path]:
    """Files whose names, tensors, metadata and recipes hold control characters."""
    folder = tmp_path / f"x{EVIL.replace('/', '')}"
    folder.mkdir()
    state = {n: v.to(torch.bfloat16).contiguous() for n, v in tiny.native(tiny.state(1)).items()}
    recipe = {"version": EVIL, "recipe": f"base{EVIL}", "inputs": {}, "output": {EVIL: 1}, "made": EVIL}
    save_file({**state, f"extra{EVIL}": torch.ones(2)}, folder / "a.safetensors", {"alkahest": json.dumps(recipe)})
    save_file({f"lora_unet_{EVIL}.lora_down.weight": torch.ones(2, 2)}, folder / "l.safetensors", {EVIL: EVIL})
    (folder / "w.json").write_text(json.dumps({EVIL: {"class_type": EVIL, "inputs": {EVIL: EVIL}}}))
    (folder / "c.toml").write_text(f'start = "{"x"}"\n["a\\u001b[31m"]\nb = "\\u001b[31m"\n')
    return {path.name[0]: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "a"),
        ("recipe", "a"),
        ("recipe", "w"),
        ("verify", "a"),
        ("convert", "a", "-o", "/nowhere/out.safetensors"),
        ("lora", "inspect", "l"),
        ("lora", "convert", "l", "-o", "/nowhere/out.safetensors"),
        ("diff", "a", "a"),
        ("finetune", "c", "-o", "/nowhere/run"),
        ("check", "a", "a"),
        ("merge", f"a + b{EVIL}", "--a", "a", "-o", "/nowhere/out.safetensors"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_no_control_character_reaches_the_terminal(
    command: tuple[str, ...], as_json: bool, evil: dict[str, Path]
) -> None:
    arguments: list[object] = [evil.get(one, one) for one in command]
    result = run(*arguments, *(["--json"] if as_json and command[0] not in ("lora",) else []))
    assert_clean(result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception


@pytest.mark.parametrize("name", [b"a\xff\xfe.safetensors", "a\ud800.safetensors".encode("utf-8", "surrogatepass")])
def test_names_that_are_no_text(name: bytes, tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(b"no checkpoint")
    for command in ("inspect", "recipe", "verify"):
        done = subprocess.run(
            [sys.executable.encode(), b"-m", b"alkahest", command.encode(), path], capture_output=True
        )
        assert done.returncode == 1
        assert b"Traceback" not in done.stderr
        assert done.stderr


def header(tmp_path: Path, text: bytes) -> Path:
    text += b" " * (-len(text) % 8)
    (tmp_path / "h.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return tmp_path / "h.safetensors"


ENTRY = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
HEADERS = {
    "small lists": b'{"a":[' + b"[]," * 8_000_000 + b"[]]}",
    "nested": b'{"a":' + b"[" * 30_000_000 + b"}",
    "a long dtype": b'{"a":{"dtype":"' + b"x" * 90_000_000 + b'","shape":[1],"data_offsets":[0,1]}}',
    "many tensors": b"{" + b",".join(ENTRY % n for n in range(300_000)) + b"}",
    "many keys": b"{" + b",".join(b'"%d":0' % n for n in range(3_000_000)) + b"}",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_cost_no_more_than_their_size(kind: str, tmp_path: Path) -> None:
    """In a process of its own, whose time and memory the system bounds."""
    path = header(tmp_path, HEADERS[kind])
    program = (
        "import resource, sys\n"
        "from alkahest.errors import FileFormatError\n"
        "from alkahest.files.header import read_header\n"
        "from alkahest.files.reader import Reader\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (resource.getrusage(resource.RUSAGE_SELF).ru_utime.__ceil__() + 6, 99))\n"
        "try: read_header(Reader(sys.argv[1]))\n"
        "except FileFormatError as error: print(len(str(error)))\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"  # not the parent's
        "print(peak.split()[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]
    length, used = map(int, done.stdout.split())
    assert length < 4000
    assert used < 1_000_000, "kilobytes"


@pytest.mark.parametrize("depth", [20, 60, 90])
@pytest.mark.parametrize("form", ["lerp({}, b, 0.3)", "lerp(b, {}, 0.3)", "weighted_sum([{}, b, a], [0.5, 0.3, 0.2])"])
def test_nested_mixtures_cost_what_they_are_long(form: str, depth: int, tmp_path: Path) -> None:
    from alkahest.recipes.text import parse

    a, b = (
        ak.open(tiny.write(tmp_path / f"{n}.safetensors", tiny.native(tiny.state(s)))) for n, s in (("a", 1), ("b", 2))
    )
    text = "a"
    for _ in range(depth):
        text = form.format(text)
    merged = parse(text, {"a": a, "b": b})
    merged.save(tmp_path / "out.safetensors", dtype="fp32")
    key = "layers.0.ffn_norm1.weight"
    right, one, two = a[key].double(), a[key].double(), b[key].double()
    for _ in range(depth):
        if form.startswith("lerp({}"):
            right = right + 0.3 * (two - right)
        elif form.startswith("lerp(b"):
            right = two + 0.3 * (right - two)
        else:
            right = 0.5 * right + 0.3 * two + 0.2 * one
    assert torch.allclose(ak.open(tmp_path / "out.safetensors")[key].double(), right, rtol=1e-5)


def test_what_repeats_itself_in_python_is_refused_before_it_costs(tmp_path: Path) -> None:
    a, b = (
        ak.open(tiny.write(tmp_path / f"{n}.safetensors", tiny.native(tiny.state(s)))) for n, s in (("a", 1), ("b", 2))
    )
    weights: Any = a
    with pytest.raises(AlgebraError, match="stands there again and again"):
        for _ in range(100):
            weights = ak.lerp(weights, weights + 0.1 * (b - a), 0.3)


@pytest.mark.parametrize(
    "output",
    [
        {"device": "meta"},
        {"path": "x"},
        {"dtype": "int8"},
        {"threads": -3},
        {"seed": "x"},
        {"metadata": {"format": "x"}},
        {"unheard of": 1},
    ],
)
def test_what_a_stranger_s_recipe_asks_to_be_written_with(output: dict[str, Any], tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "a.safetensors", tiny.native(tiny.state(1)))
    recipe = {"version": "1", "recipe": "a", "inputs": {}, "output": output}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    result = run("merge", "--recipe", tmp_path / "r.json", "--a", path, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("given", [{"layers": float("inf")}, {"width": 1e999}, {"seed": float("nan")}, {"layers": 1.5}])
def test_made_up_sizes_that_are_no_numbers(given: dict[str, float]) -> None:
    with pytest.raises(AlgebraError, match="is a whole number"):
        ak.made_up(**given)  # type: ignore[arg-type]


def test_q_k_and_v_of_different_widths_are_not_fused(tmp_path: Path) -> None:
    tensors = {}
    for name, width in (("to_q", 96), ("to_k", 64), ("to_v", 96)):
        tensors[f"layers.0.attention.{name}.lora_A.weight"] = torch.ones(4, width)
        tensors[f"layers.0.attention.{name}.lora_B.weight"] = torch.ones(96, 4)
    save_file(tensors, tmp_path / "l.safetensors")
    for flavour in ("kohya", "fused"):
        with pytest.raises(UnsupportedError, match="cannot be fused"):
            ak.convert_lora(ak.open_lora(tmp_path / "l.safetensors"), tmp_path / "o.safetensors", flavour)


def components(folder: Path) -> Path:
    import shutil

    shutil.copytree(ak.mini.load("base").path.parent / "components", folder)
    return folder


DAMAGE: dict[str, Any] = {
    "a list": lambda f: (f / "model_index.json").write_text("[1, 2]"),
    "no JSON": lambda f: (f / "model_index.json").write_text("{"),
    "other classes": lambda f: (f / "model_index.json").write_text('{"vae": ["os", "system"]}'),
    "cut encoder": lambda f: next((f / "text_encoder").glob("*.safetensors")).write_bytes(
        b"\x08\0\0\0\0\0\0\0{}      "
    ),
    "cut vae": lambda f: next((f / "vae").glob("*.safetensors")).write_bytes(b"123"),
    "vae config": lambda f: (f / "vae" / "config.json").write_text(
        '{"_class_name": "AutoencoderKL", "latent_channels": "x"}'
    ),
    "encoder config": lambda f: (f / "text_encoder" / "config.json").write_text(
        '{"model_type": "qwen3", "hidden_size": -1}'
    ),
    "encoder config is a list": lambda f: (f / "text_encoder" / "config.json").write_text("[]"),
    "tokenizer": lambda f: [p.write_text("[") for p in (f / "tokenizer").glob("*.json")],
    "scheduler": lambda f: [p.write_text('"x"') for p in (f / "scheduler").glob("*.json")],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_components_are_told_so(kind: str, tmp_path: Path) -> None:
    folder = components(tmp_path / "c")
    DAMAGE[kind](folder)
    with pytest.raises(AlkahestError, match="components: "):
        ak.pipeline(ak.mini.load("base"), folder)


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_no_pickle_is_opened_among_components(part: str, tmp_path: Path) -> None:
    folder = components(tmp_path / "c")
    for path in (folder / part).glob("*.safetensors"):
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save({"a": torch.ones(1)}, folder / part / name)
        path.unlink()
    with pytest.raises(UnsupportedError, match=r"(?s)a pickle.*never read.*\.bin"):
        ak.pipeline(ak.mini.load("base"), folder)


def test_unreadable_and_circular_folders(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "x.safetensors"):
        with pytest.raises(FileFormatError):
            ak.open(path)


@pytest.mark.parametrize("after", [0.35, 0.6, 1.0, 1.6, 2.4, 6.0])
def test_an_interrupt_is_one_line_whenever_it_comes(after: float, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cyan ball on a beach\na cyan tree at night\n")
    member = {name: str(ak.mini.load(name).path) for name in ("base-variant", "base", "tb1")}
    options = ["--on", member["tb1"], "--prompts", str(tmp_path / "p.txt"), "--count", "500"]
    command = [sys.executable, "-m", "alkahest", "multiplier", member["base-variant"], member["base"], *options]
    # A shell that runs this in the background has told its children to ignore the signal.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard)
    time.sleep(after)
    started.send_signal(signal.SIGINT)
    _, told = started.communicate(timeout=60)
    assert started.returncode == 130, told[-500:]
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1] == "interrupted: nothing was written"


def test_an_interrupt_of_code_run_from_text_is_one_too(tmp_path: Path) -> None:
    """As imports do; ``python -m`` then ends by the signal, though the interrupt was caught."""
    program = """
import alkahest.__main__, alkahest.cli

def app():
    try:
        exec("raise KeyboardInterrupt")
    except KeyboardInterrupt:
        print("interrupted")
    raise SystemExit(130)

alkahest.cli.app = app
alkahest.__main__.main()
"""
    (tmp_path / "interrupted.py").write_text(program)
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "interrupted\n")


def test_what_python_shows_is_clean_too(evil: dict[str, Path]) -> None:
    checkpoint = ak.open(evil["a"])
    part = ak.open_part(evil["a"])
    shown = [
        repr(checkpoint),
        repr(part),
        repr(checkpoint + 2 * (checkpoint - checkpoint)),
        repr(checkpoint.part("layers")),
    ]
    with pytest.raises(AlkahestError) as told:
        ak.open_lora(evil["l"])
    shown += [str(told.value), str(AlkahestError(EVIL, EVIL, file=EVIL, key=EVIL, found=EVIL, fix=EVIL))]
    for text in shown:
        assert_clean(text)
