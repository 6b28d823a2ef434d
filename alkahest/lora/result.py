"""What an extraction kept, and what it left out."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from alkahest.engine.record import METADATA_KEY, Recipe
from alkahest.errors import printable
from alkahest.files.reader import size_text
from alkahest.files.whole import replaced
from alkahest.lora.parts import Parts
from alkahest.lora.write import Pair, check_target, save_lora
from alkahest.model.families import Family
from alkahest.sources.lora import Lora, open_lora

if TYPE_CHECKING:
    import pandas

# Column -> what it is, beside the names that a delta table has.
REPORT = {
    "kept": "LoRA, full (stored whole), or why it is left out: excluded, no matrix, too small, noise, rounding "
    "(the variant is the base rounded to its file's format)",
    "rank": "columns of up, rows of down",
    "energy": "1 - |d - what the stored factors make|^2 / |d|^2",
    "delta_norm": "|d|",
    "noise": "share of |d|^2 that rounding of the files may have made (see alkahest.lora.noise); NaN where unknown",
    "edge_rank": "how many of the singular values that were found reach beyond that noise",
    "capped": "whether rank_max decided the rank",
    "nbytes": "size in the file",
}


@dataclass(frozen=True, repr=False)
class Extracted:
    """An extracted LoRA: ``report`` has a row for each changed tensor (`REPORT`), `save` writes it."""

    pairs: Mapping[str, Pair]  # tensor -> its down and up
    full: Mapping[str, Tensor]  # tensor -> a difference that is kept whole
    report: pandas.DataFrame  # columns: `REPORT`
    recipe: Recipe  # what it was made of
    family: Family  # the kind of model
    inputs: tuple[Path, ...] = ()  # files that must not be overwritten
    parts: Parts = field(default_factory=lambda: Parts(None))

    @property
    def energy(self) -> float:
        """Share of the energy of all changed tensors that the LoRA keeps, those left out included."""
        squares = self.report.delta_norm**2
        return float((squares * self.report.energy).sum() / squares.sum())

    @property
    def nbytes(self) -> int:
        return int(self.report.nbytes.sum())

    def save(self, path: str | os.PathLike[str], flavour: str = "comfyui") -> Lora:
        """Write it in one step, and open it.

        >>> bridge + 0.1 * ak.extract_lora(base - bridge).save("supplement.safetensors")

        ``flavour`` is one of `alkahest.lora.write.FLAVOURS`; the default loads in ComfyUI and diffusers.
        """
        target = check_target(path, flavour, bool(self.full), self.inputs)
        before = replaced(target)
        save_lora(target, self.pairs, self.full, flavour, {METADATA_KEY: self.recipe.to_json()}, family=self.family)
        self.parts.remove()
        saved = open_lora(target)
        saved.notes += before
        return saved

    def summary(self) -> dict[str, Any]:
        """What was kept, in numbers."""
        squares = self.report.delta_norm**2
        kept = self.report[self.report.kept == "LoRA"]
        left = self.report[~self.report.kept.isin(["LoRA", "full"])]
        return {
            "recipe": self.recipe.text,
            "tensors": len(kept),
            "full": len(self.full),
            "bytes": self.nbytes,
            "dtype": self.recipe.output["dtype"],
            "ranks": [int(kept["rank"].min()), int(kept["rank"].max())] if len(kept) else None,
            "energy": self.energy,
            "energy_of_lora": self.recipe.output["energy"],
            "capped": int(kept.capped.sum()),
            "noise": float((kept.noise * kept.delta_norm**2).sum() / (kept.delta_norm**2).sum())
            if len(kept) and not kept.noise.isna().any()
            else None,
            "left_out": {
                reason: {"tensors": len(rows), "energy": float((rows.delta_norm**2).sum() / squares.sum())}
                for reason, rows in left.groupby("kept")
            },
        }

    def __repr__(self) -> str:
        return printable("\n".join([self.recipe.text, *(f"  {name:9} {text}" for name, text in self._facts())]))

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in self._facts())
        return f"<div><code>{html.escape(self.recipe.text)}</code><table>{rows}</table></div>"

    def _facts(self) -> list[tuple[str, str]]:
        about = self.summary()
        ranks = about["ranks"]
        many = f"{about['tensors']} tensors" + (f" and {about['full']} whole" if about["full"] else "")
        facts = [("size", f"{many}, {size_text(about['bytes'])} in {about['dtype']}")]
        if ranks:
            facts.append(("rank", f"{ranks[0]} to {ranks[1]}" if ranks[0] < ranks[1] else f"{ranks[0]}"))
        of_these = f"{about['energy_of_lora']:.4f} of these tensors' delta, " if about["tensors"] else ""
        facts.append(("energy", f"{of_these}{about['energy']:.4f} of all that changed"))
        if about["capped"]:
            facts.append(("capped", f"rank_max decided the rank of {about['capped']} tensors: the rule asked for more"))
        if about["noise"] is not None:
            facts.append(("noise", f"{about['noise']:.4f} of the delta may be rounding of the files"))
        for reason, what in about["left_out"].items():
            facts.append(
                ("left out", f"{what['tensors']} tensors ({reason}): {what['energy']:.4f} of all that changed")
            )
        return facts
