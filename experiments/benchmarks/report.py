"""The benchmark's table and picture, from its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

ORDER = ["merge", "table", "lora", "open", "live", "import"]
MARKS = ("<!-- table: written by make bench -->", "<!-- end -->")


def write(rows: pd.DataFrame, machine: dict[str, object], results: Path) -> None:
    """bench.csv, machine.json, bench.svg and the table in README.md."""
    results.mkdir(parents=True, exist_ok=True)
    rows = with_earlier(rows, machine, results)
    rows.round(4).to_csv(results / "bench.csv", index=False)
    (results / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
    picture(rows, machine, results / "bench.svg")
    readme = results.parent / "README.md"
    if readme.exists():
        before, _, rest = readme.read_text().partition(MARKS[0])
        text = "\n".join([MARKS[0], goals(rows), table(rows), said(machine), MARKS[1]])
        readme.write_text(before + text + rest.partition(MARKS[1])[2])
    print(goals(rows))
    print(table(rows))


def with_earlier(rows: pd.DataFrame, machine: dict[str, object], results: Path) -> pd.DataFrame:
    """These rows, and those of an earlier run on the same machine that these do not replace, in order of job and
    size.
    """
    try:
        known = json.loads((results / "machine.json").read_text())
        earlier = pd.read_csv(results / "bench.csv")
    except (OSError, ValueError):
        return rows
    if {**known, "date": ""} != {**machine, "date": ""}:
        return rows
    again = set(zip(rows.what, rows["size"], strict=True))
    kept = earlier[[place not in again for place in zip(earlier.what, earlier["size"], strict=True)]]
    together = pd.concat([kept, rows], ignore_index=True)
    return together.sort_values(
        ["what", "GB"], key=lambda column: column.map(ORDER.index) if column.name == "what" else column, kind="stable"
    )


def medians(rows: pd.DataFrame) -> pd.DataFrame:
    """The median of each tool's rounds, memory as its peak."""
    groups = rows.groupby(["what", "size", "cache", "tool"], sort=False)
    found = groups.agg(
        GB=("GB", "first"),
        wall=("wall", "median"),
        cpu=("cpu", "median"),
        anon=("anon", "max"),
        mapped=("mapped", "max"),
        runs=("round", "size"),
    )
    return found.reset_index()


def ratio(
    rows: pd.DataFrame, what: str, size: str, tool: str, other: str, column: str, cache: str = "warm"
) -> float | None:
    """One tool's median cost over another's, which took turns."""
    chosen = rows[(rows.what == what) & (rows["size"] == size) & (rows.cache == cache)]
    one, two = (chosen[chosen.tool == name][column] for name in (tool, other))
    return float(one.median() / two.median()) if len(one) and len(two) else None


def goals(rows: pd.DataFrame) -> str:
    """What was aimed at, and whether it is met."""
    lines = []
    merges = rows[(rows.what == "merge") & (rows.cache != "first time")]

    def line(job: str, goal: str, value: float | None, met: bool, shown: str) -> None:
        if value is not None:
            lines.append(f"| {job} | {goal} | {shown} | {'met' if met else '**not met**'} |")

    for size, cache in dict.fromkeys(zip(merges["size"], merges.cache, strict=True)):
        found = ratio(rows, "merge", size, "alkahest", "floor", "wall", cache)
        line(
            f"merge, {size} a file, {cache}",
            "at most 1.5 x the floor",
            found,
            (found or 9) <= 1.5,
            f"{found or 0:.2f} x",
        )
        for other, least in (("mergekit", 3), ("torch", 3), ("sd-mecha", 6)) if cache == "warm" else ():
            found = ratio(rows, "merge", size, other, "alkahest", "cpu", cache)
            line(
                f"merge, {size} a file, {cache}",
                f"{other}: at least {least} x our CPU time",
                found,
                (found or 0) >= least,
                f"{found or 0:.1f} x",
            )
    all_merges = rows[(rows.what == "merge") & (rows.tool == "alkahest")]
    if len(all_merges):
        peaks = all_merges.groupby("size", sort=False).anon.max()
        shown = ", ".join(f"{peak:.0f} MB at {size}" for size, peak in peaks.items())
        line("merge, anonymous memory", "at most 600 MB at any size", 1.0, float(peaks.max()) <= 600, shown)
    tables = rows[rows.what == "table"]
    for size, cache in dict.fromkeys(zip(tables["size"], tables.cache, strict=True)):
        found = ratio(rows, "table", size, "alkahest", "floor", "wall", cache)
        line(
            f"delta_table, {size} a file, {cache}",
            "at most 1.3 x reading both",
            found,
            (found or 9) <= 1.3,
            f"{found or 0:.2f} x",
        )
    for other in ("torch.linalg.svd", "peft"):
        found = ratio(rows, "lora", "2.9 GB", other, "alkahest", "wall")
        line(
            "LoRA of one layer, energy 0.995",
            f"{other}: at least 10 x our time",
            found,
            (found or 0) >= 10,
            f"{found or 0:.1f} x",
        )
    found = ratio(rows, "live", "2.9 GB", "alkahest", "floor", "wall")
    line(
        "LiveModel.set, 4 layers",
        "at most 2 x one pass over what it changes",
        found,
        (found or 9) <= 2,
        f"{found or 0:.2f} x",
    )
    for what, goal, limit, job in (
        ("open", "under 50 ms", 0.05, "open and print"),
        ("import", "under 0.2 s beyond torch", 0.2, "import alkahest"),
    ):
        own = rows[(rows.what == what) & (rows.tool == "alkahest")]
        if len(own):
            value = float(own.wall.median())
            line(f"{job}, {own['size'].iloc[0]}", goal, value, value <= limit, f"{1000 * value:.0f} ms")
    return "| job | goal | measured | |\n| --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"


def table(rows: pd.DataFrame) -> str:
    """Every job, size and tool."""
    lines = [
        "| job | size of a file | page cache | tool | wall s | CPU s | CPU s/GB | peak anonymous MB | peak mapped MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in medians(rows).itertuples():
        lines.append(
            f"| {row.what} | {row.size} | {row.cache} | {row.tool} | {row.wall:.3g} | {row.cpu:.3g} | "
            f"{row.cpu / row.GB:.3g} | {row.anon:.0f} | {row.mapped:.0f} |"
        )
    return "\n".join(lines) + "\n"


def said(machine: dict[str, object]) -> str:
    about = ", ".join(f"{name}: {value}" for name, value in machine.items())
    return f"Medians over the rounds, memory as the largest of them. Machine: {about}.\n"


def picture(rows: pd.DataFrame, machine: dict[str, object], path: Path) -> None:
    """Wall time, processor time and memory of a merge against the size of a file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from alkahest.lab.figure import COLOURS

    merges = medians(rows[(rows.what == "merge") & (rows.cache == "cold")])
    if merges.empty:
        return
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (column, label) in zip(
        figure.subplots(1, 3),
        {"wall": "wall time (s)", "cpu": "processor time (s)", "anon": "peak anonymous memory (MB)"}.items(),
        strict=True,
    ):
        for number, tool in enumerate(dict.fromkeys(merges.tool)):
            own = merges[merges.tool == tool].sort_values("GB")
            axes.plot(
                own.GB, own[column], marker="osD^vX"[number % 6], color=COLOURS[number % len(COLOURS)], label=tool
            )
        axes.set(xlabel="size of each file (GB, log scale)", ylabel=f"{label}, log scale", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(
        f"a + 0.7 (b - c) to bf16, three made-up files in, one out; {machine['cores']} cores, from the disk"
    )
    with mpl.rc_context({"svg.hashsalt": "alkahest", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
