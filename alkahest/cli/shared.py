"""What the commands share: options, progress, errors, exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import click
import typer

import alkahest
from alkahest.cli.words import at_command_line
from alkahest.errors import INTERRUPTED, AlkahestError, OutputError, UnsupportedError, printable
from alkahest.files.paths import expanded

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Merge, measure and study Z-Image checkpoints.",
    epilog="Exit codes: 0 done, 1 refused or failed (stderr says why), 2 wrong usage, 130 interrupted.",
)

_NEAR_NUMBER = re.compile(r"([+-]?\d[\d_]*)(?:[.,](\d+))?\s*[x\u00d7]?", re.IGNORECASE)


def _meant_by(text: str) -> str:
    """The number that somebody may have meant by 171,1 or 20x; "" for nothing like one."""
    near = _NEAR_NUMBER.fullmatch(text.strip())
    return ".".join(part for part in near.groups() if part) if near else ""


def number(text: str | float) -> float:
    """A number of an option, with a word to who writes 171,1 or 171.1x."""
    try:
        return float(text)
    except ValueError:
        meant = _meant_by(str(text))
        raise typer.BadParameter(f"{text} is no number{f'; write {meant}' if meant else ''}") from None


def number_option(help: str) -> Any:
    """An option that takes a number."""
    return typer.Option(help=help, parser=number, metavar="<float>")


Output = Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors), or a new folder.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="fp32, fp16, bf16, fp8_e4m3fn, fp8_e5m2, comfy_quant or scaled_fp8; default: as the leading input."
    ),
]
Layout = Annotated[str | None, typer.Option(help="native (ComfyUI), diffusers or all-in-one.")]
ModelsDir = Annotated[
    Path | None, typer.Option(help="ComfyUI's folder, its models folder, or any that holds the files a workflow names.")
]
Passing = Annotated[
    list[str] | None,
    typer.Option(
        help="Of a workflow: a kind of node that changes no weights, where Alkahest does not know. Repeatable."
    ),
]
NodeId = Annotated[
    str | None, typer.Option("--node", help="Of a workflow that saves several models: the id of the node that saves.")
]
Rounding = Annotated[str, typer.Option(help="nearest (to even) or stochastic.")]
Seed = Annotated[int, typer.Option(help="Seed of stochastic rounding.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps, for the arithmetic.")]
Shards = Annotated[str | None, typer.Option(help="Write shards of at most this size, such as 5GB, into a new folder.")]
Threads = Annotated[int | None, typer.Option(help="Workers; the output does not depend on it.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Keep NaN, infinity and overflow; count them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Csv = Annotated[Path | None, typer.Option(help="Also write the whole table, a row for each tensor.")]
Picture = Annotated[Path | None, typer.Option("--plot", help="Also draw a picture into this PNG file.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="For a multiplier by pictures: a prompt a line, asking for what the variant learned. mini:NAME: of a "
        "miniature."
    ),
]
Pictures = Annotated[
    Path | None, typer.Option(help="The same from pictures that are there: a folder, with a caption beside each.")
]
Ordinary = Annotated[Path | None, typer.Option(help="Prompts of everything else, one a line; default: our own.")]
Components = Annotated[
    str | None, typer.Option(help="Text encoder, tokenizer and VAE for it: a pipeline folder or a hub id.")
]
Cfg = Annotated[float | None, number_option("Guidance that it is for; 1 is none. Default: 2.")]
Count = Annotated[int | None, typer.Option(help="How many pictures are drawn of each kind; default: 24.")]
Storage = Annotated[str | None, typer.Option(help="Hold the model that draws in fp8_e4m3fn: half the memory of bf16.")]
MadeFor = Annotated[
    str | None,
    typer.Option(help="For a LoRA or a sum, whose multiplier pictures are to say: the model it was made for."),
]
NAMED = {"ignore_unknown_options": True}  # --bridge and the like are ours to read
# Under which the commands stand in `alkahest --help`.
MERGING, MEASURING, LORAS = "Open, merge and check", "Measure", "LoRAs"
WORKFLOWS, TRAINING, STUDYING = "Recipes and ComfyUI", "Fine-tune", "Study"


def example(*lines: str) -> str:
    """The end of a command's help: lines that can be run as they stand."""
    return "\n\n".join(["For example:", *(f"`{line}`" for line in lines)])


@app.callback(invoke_without_command=True)
def _about(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(alkahest.__version__)
        raise typer.Exit


def drain(events: Iterator[Any], quiet: bool, unit: str = "B") -> Any:
    """Run a generator of events to its end behind a progress bar; its last item."""
    from tqdm import tqdm

    event = None
    _raise_if_stopped()
    # disable=None: no bar where stderr is not a terminal.
    stream = sys.stderr.stream if isinstance(sys.stderr, _Cleaned) else sys.stderr  # a bar moves the cursor
    bar = tqdm(unit=unit, unit_scale=unit == "B", disable=True if quiet else None, file=stream)
    with bar, contextlib.closing(events):  # type: ignore[type-var]
        for event in events:
            _raise_if_stopped()
            bar.total = event.total
            bar.set_postfix_str(printable(event.key[:32]), refresh=False)
            bar.update(event.done - bar.n)
            if note := getattr(event, "note", ""):
                tqdm.write(printable(note), file=stream)
    return event


def split_arguments(arguments: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The one argument without a name, and the ``--name value`` pairs: paths, or numbers."""
    alone: str | None = None
    given: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not argument.startswith("--") and alone is None:
            alone = argument
            continue
        if not argument.startswith("--") or not name.isidentifier():
            raise typer.BadParameter(f"unexpected argument {argument!r}")
        if not equals:
            value = next(rest, "")
        if not value:
            raise typer.BadParameter(f"--{name} needs a path or a number")
        with contextlib.suppress(ValueError):
            given[name] = float(value)
            continue
        _require_no_near_number(name, value)
        given[name] = value
    return alone, given


def _require_no_near_number(name: str, value: str) -> None:
    """Refuse what was meant as a number, and would be looked for as a file."""
    if (meant := _meant_by(value)) and not Path(value).exists():
        raise typer.BadParameter(f"--{name} {value} is no number; write --{name} {meant}")


def by_pictures(
    prompts: Path | None,
    pictures: Path | None,
    ordinary: Path | None,
    components: str | None,
    cfg: float | None,
    count: int | None,
    storage: str | None,
    made_for: str | None = None,
) -> dict[str, Any]:
    """The options of a multiplier by pictures that were given; its files of prompts are read."""
    given = {
        "prompts": None if prompts is None else lines_of(prompts, "multiplier"),
        "pictures": pictures,
        "ordinary": None if ordinary is None else lines_of(ordinary, "multiplier"),
        "components": components,
        "cfg": cfg,
        "count": count,
        "storage": storage,
        "base": None if made_for is None else alkahest.open(made_for),
    }
    return {name: value for name, value in given.items() if value is not None}


def lines_of(path: Path, operation: str) -> list[str]:
    """The lines of a text file that are not empty, or prompts for ``mini:NAME``; AlkahestError if there are none."""
    if str(path).startswith("mini:"):
        return alkahest.mini.prompts(str(path).removeprefix("mini:"))
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AlkahestError(operation, "the prompts cannot be read", file=path, found=error) from None
    if not lines:
        raise AlkahestError(operation, "there are no prompts", file=path, fix="a prompt a line")
    return lines


def require_outputs(csv: Path | None, plot: Path | None, html: Path | None) -> None:
    """Refuse before anything is measured what could not be written after it, or would overwrite something else."""
    for path, suffix in ((csv, ".csv"), (plot, ".png"), (html, ".html")):
        if path is None:
            continue
        if path.suffix.lower() != suffix:
            raise UnsupportedError(
                "save", f"this is to be a {suffix} file", file=path, fix=f"name it like {path.stem or 'delta'}{suffix}"
            )
        if not expanded(path, "save").resolve().parent.is_dir():
            raise OutputError("save", "the output folder does not exist", file=path.parent, fix="create it first")
    if plot is not None or html is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UnsupportedError("plot", "matplotlib is not installed", fix="pip install matplotlib") from None


def options_of(context: typer.Context | None = None, **options: Any) -> dict[str, Any]:
    """The options that are not the default; with the command's ``context``, also a default that was typed."""
    from alkahest.engine.options import Options

    defaults, typed = Options(), set()
    if context is not None:
        sources = {name: context.get_parameter_source(name) for name in options}
        typed = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    return {name: value for name, value in options.items() if name in typed or value != getattr(defaults, name)}


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Print our own errors without a traceback, and leave with the documented exit code."""

    cleaned = contextlib.ExitStack()
    cleaned.enter_context(contextlib.redirect_stdout(_Cleaned(sys.stdout)))
    cleaned.enter_context(contextlib.redirect_stderr(_Cleaned(sys.stderr)))
    # A shell tells background jobs to ignore SIGINT; that stays so.
    heard = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, _stop) for number in heard}
    try:
        yield
    except AlkahestError as error:
        print(at_command_line(error), file=sys.stderr)
        raise typer.Exit(1) from None
    except (typer.Exit, typer.Abort, click.ClickException):
        raise
    except BaseException:
        # Importing a package may turn the interrupt into an error of its own.
        if not _stopped and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            raise
        if _stopped and _stopped[0] != signal.SIGINT:
            raise SystemExit(128 + _stopped[0]) from None
        print(INTERRUPTED, file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        cleaned.close()
        _stopped.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Cleaned(io.TextIOBase):
    """A stream through which no control character of a stranger's text passes, nor text that it cannot encode."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        clean = printable(text)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(clean.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return bool(self.stream.isatty())

    def fileno(self) -> int:
        return int(self.stream.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(getattr(self.stream, "encoding", "utf-8"))


_stopped: list[int] = []


def _stop(number: int, frame: object) -> None:
    _stopped.append(number)
    _raise_if_stopped()


def _raise_if_stopped() -> None:
    # Importing torch swallows an exception raised by a signal, so the signal is remembered.
    if _stopped and _stopped[0] == signal.SIGINT:
        raise KeyboardInterrupt
    if _stopped:
        raise SystemExit(128 + _stopped[0])


@contextlib.contextmanager
def say_replaced(*outputs: Path | None) -> Iterator[None]:
    """Tell on standard error which outputs took the place of something, once they are written."""
    from alkahest.files.whole import replaced

    before = [note for output in outputs if output is not None for note in replaced(expanded(output, "save"))]
    yield
    for note in before:
        print(f"note: {note}", file=sys.stderr)


def save(weights: alkahest.Weights, output: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Write weights and print what was written."""
    result = drain(weights.stream(output, **options), quiet).result
    print(json.dumps(dataclasses.asdict(result), indent=2, default=str) if as_json else result)
