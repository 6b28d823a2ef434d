"""The models picker: which of your files is which, written once to the file that every notebook reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from alkahest.errors import AlkahestError
from alkahest.files.locate import HUB_ID
from alkahest.files.paths import expanded
from alkahest.files.whole import replaced
from alkahest.lab.checkpoint_picker import checkpoints_in
from alkahest.lab.models import COMPONENTS, KEYS, read_models, write_models
from alkahest.lab.panel import note_html, reason_of
from alkahest.sources.checkpoint import Checkpoint
from alkahest.sources.checkpoint import open as open_checkpoint

_ALIGNED = {"description_width": "25em"}
_WIDE = widgets.Layout(width="98%")


def models_picker(models: str | os.PathLike[str] = "models.toml", folder: str | os.PathLike[str] = ".") -> ModelsPicker:
    """Say which of your files is which, and save that to the file which `open_models` reads.

    Files whose sizes differ from the others' are said to. *Save* writes nothing as long as one cannot be opened.

    Parameters
    ----------
    models : str or path, default "models.toml"
        The file that is read at first and saved: a line ``name = "path"`` for each.
    folder : str or path, default "."
        Whose checkpoints the boxes offer; they take any path, ``mini:NAME`` or hub id as well.

    Returns
    -------
    ModelsPicker

    Examples
    --------
    >>> panels.models_picker("models.toml", folder="~/ComfyUI/models/diffusion_models")
    """
    return ModelsPicker(Path(models), Path(folder))


class ModelsPicker(widgets.VBox):  # type: ignore[misc]
    """See `models_picker`. ``named`` is what the boxes say, ``opened`` the checkpoints behind them."""

    def __init__(self, models: Path, folder: Path) -> None:
        self.path = models
        self.folder = widgets.Text(
            value=str(folder),
            description="look for checkpoints in",
            continuous_update=False,
            style=_ALIGNED,
            layout=_WIDE,
        )
        self.boxes = {name: _box(f"{name}: {what}") for name, (what, _) in KEYS.items()}
        self.boxes[COMPONENTS] = _box(f"{COMPONENTS}: a pipeline folder or hub id, to draw with")
        self.headers = {name: widgets.HTML() for name in self.boxes}
        self.save_button = widgets.Button(description=f"Save {models.name}", tooltip="Name these for every notebook")
        self.status = widgets.HTML()
        self.opened: dict[str, Checkpoint] = {}
        self._parts: Mapping[str, str] | None = None  # components as a table, which a box cannot hold
        self.folder.observe(lambda _: self._look(), "value")
        for name, box in self.boxes.items():
            box.observe(lambda _, name=name: self._chosen(name), "value")
        self.save_button.on_click(lambda _: self.save())
        rows = [widgets.VBox([self.boxes[name], self.headers[name]]) for name in self.boxes]
        self._look()
        self._fill()
        super().__init__([self.folder, *rows, self.save_button, self.status])

    @property
    def named(self) -> dict[str, Any]:
        """What the boxes say; what is empty is left out."""
        found: dict[str, Any] = {name: box.value.strip() for name, box in self.boxes.items() if box.value.strip()}
        return found if self._parts is None else {**found, COMPONENTS: dict(self._parts)}

    def __repr__(self) -> str:
        return f"models picker for {self.path.name}, which names {', '.join(self.named) or 'nothing yet'}"

    def save(self) -> Path | None:
        """Write the file, if everything that is named can be opened."""
        wrong = [name for name in self.named if name != COMPONENTS and name not in self.opened]
        if wrong:
            self._say(f"nothing is saved: {', '.join(wrong)} cannot be opened, see above", "alert")
            return None
        try:
            before = replaced(expanded(self.path, "save"))
            path = write_models(self.path, {name: self._absolute(value) for name, value in self.named.items()})
        except AlkahestError as error:
            self._say(reason_of(error), "alert")
            return None
        missing = [name for name in KEYS if name not in self.named]
        rest = f"; where a notebook asks for {' or '.join(missing)}, it takes miniatures" if missing else ""
        told = "".join(f"{note}\n" for note in before)
        self._say(f"{told}saved {path}{rest}. Run the notebook again from its top.")
        return path

    def _fill(self) -> None:
        """What the file says already; a file that cannot be read is said, and Save replaces it."""
        try:
            paths = read_models(self.path).paths
        except AlkahestError as error:
            self._say(f"{reason_of(error)}\n{self.path.name} is replaced if you save", "alert")
            return
        for name, value in paths.items():
            if isinstance(value, Mapping):
                self._parts = value
                self.boxes[name].disabled = True
                self.headers[name].value = note_html(", ".join(f"{part} = {path}" for part, path in value.items()))
            else:
                self.boxes[name].value = str(value)

    def _look(self) -> None:
        found = [str(path) for path, _ in checkpoints_in(expanded(self.folder.value, "open"))]
        for name in KEYS:
            self.boxes[name].options = found
        self._tell()

    def _chosen(self, name: str) -> None:
        value = self.boxes[name].value.strip()
        if name == COMPONENTS:
            here = not value or HUB_ID.fullmatch(value) or expanded(value, "open").exists()
            self.headers[name].value = (
                "" if here else note_html("there is no such folder, and it is no hub id", "alert")
            )
            return
        self.opened.pop(name, None)
        self.headers[name].value = ""
        if value:
            try:
                self.opened[name] = one = open_checkpoint(value)
                self.headers[name].value = note_html(_header(one))
            except AlkahestError as error:
                self.headers[name].value = note_html(reason_of(error), "alert")
        self._tell()

    def _tell(self) -> None:
        """What stands in the way, all of it: a folder that is not there, files that cannot be combined."""
        place = expanded(self.folder.value, "open")
        problems = [] if place.is_dir() else [f"there is no folder {place}"]
        sizes: dict[str, list[str]] = {}
        for name, one in self.opened.items():
            about = one.summary()
            sizes.setdefault(f"{about['layers']} layers, width {about['width']}", []).append(name)
        if len(sizes) > 1:
            told = "; ".join(f"{', '.join(names)}: {size}" for size, names in sizes.items())
            problems.append(f"these differ in size and cannot be combined: {told}")
        self._say("\n".join(problems), "alert")

    def _absolute(self, value: Any) -> Any:
        """A path that is meant from here, wherever the file lies; ``mini:`` and hub ids as they are."""
        if isinstance(value, str) and not value.startswith("mini:") and expanded(value, "open").exists():
            return str(expanded(value, "open").absolute())
        return value

    def _say(self, text: str, role: str = "status") -> None:
        self.status.value = note_html(text, role)


def _box(label: str) -> Any:
    return widgets.Combobox(
        description=label,
        ensure_option=False,
        continuous_update=False,
        style=_ALIGNED,
        layout=_WIDE,
        placeholder="none",
    )


def _header(one: Checkpoint) -> str:
    about = one.summary()
    return (
        f"{about['parameters']:,} parameters, {about['layers']} layers, width {about['width']}; {about['layout']}, "
        f"{', '.join(about['storage'])}, {about['bytes'] / 1e9:.3g} GB"
    )
