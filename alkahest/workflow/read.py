"""Files with a ComfyUI workflow in them: JSON, pictures, and checkpoints that ComfyUI saved."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from alkahest.errors import RecipeError, refuse_unknown_options
from alkahest.files.locate import locate
from alkahest.files.paths import expanded
from alkahest.files.reader import Reader
from alkahest.workflow.graph import Graph, json_in, parsed_json, read_graph
from alkahest.workflow.translate import WorkflowRecipe, recipes_of

PNG = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"iTXt", b"zTXt")
_MAX_TEXT = 64 << 20  # bytes of one text in a picture, unpacked


@refuse_unknown_options
def read_workflow(
    path: str | os.PathLike[str], node: str | None = None, passing: Collection[str] = ()
) -> list[WorkflowRecipe]:
    """The recipes in a ComfyUI workflow, one for each model that it saves, or else draws with.

    Parameters
    ----------
    path : str or path
        The editor's form (with subgraphs) or the API form as JSON, a PNG picture, or a checkpoint that ComfyUI saved,
        of which only the recipe of that very file is given.
    node : str, optional
        The id of the one node that is asked for.
    passing : collection of str
        Kinds of nodes of which you know that they change no weights, where Alkahest does not.

    Returns
    -------
    list of WorkflowRecipe
        Each with its ``text``, its ``files`` and ``notes``; ``locate(models)`` finds the files in ComfyUI's folder.

    Raises
    ------
    RecipeError
        That names the node, for whatever cannot be said in a recipe.

    Examples
    --------
    >>> for name, model in {"bridge": bridge, "variant": variant, "base": base}.items():
    ...     saved = model.save(f"{name}.safetensors")
    >>> a, v, b = (ak.open(f"{name}.safetensors") for name in ("bridge", "variant", "base"))
    >>> notes = ak.write_workflow(a + 5 * (v - b), "merge.json")
    >>> (recipe,) = ak.read_workflow("merge.json")
    >>> recipe.text
    'bridge + 5 * (variant - base)'
    """
    path = expanded(path, "recipe")
    if path.suffix == ".safetensors" or path.is_dir():
        found = recipes_of(graph_in(locate(path).metadata, path), path, node, passing)
        return _own(found, path) if node is None else found
    reader = Reader(path)
    if reader.size >= 8 and reader.read(0, 8) == PNG:
        return recipes_of(graph_in(dict(_texts(reader)), path), path, node, passing)
    return recipes_of(read_graph(json_in(reader), path), path, node, passing)


def graph_in(metadata: Mapping[str, str], file: object) -> Graph:
    """The graph in what ComfyUI writes into its files: ``prompt`` is the API form, ``workflow`` the editor's."""
    for name in ("prompt", "workflow"):
        if metadata.get(name, "").strip() not in ("", "{}", "null"):
            return read_graph(parsed_json(metadata[name].encode("utf-8", "surrogatepass"), file), file)
    raise RecipeError(
        "workflow",
        "there is no workflow in this file",
        file=file,
        expected="prompt or workflow, which ComfyUI writes unless it is told --disable-metadata",
    )


def _own(recipes: list[WorkflowRecipe], path: Path) -> list[WorkflowRecipe]:
    """Of several recipes the one whose saver wrote a file of this name: ``prefix_00001_.safetensors``."""
    stem = re.sub(r"_\d{5,}_$", "", path.stem)
    mine = [recipe for recipe in recipes if recipe.saved_as.replace("\\", "/").rsplit("/")[-1] == stem]
    return mine or recipes


def _texts(reader: Reader) -> Iterator[tuple[str, str]]:
    """Keyword and text of a PNG's text chunks (W3C PNG, 11.3.3); ComfyUI writes tEXt through Pillow."""
    place, room = len(PNG), _MAX_TEXT  # of all chunks together: each may unpack to a thousand times its size
    while room > 0 and place + 12 <= reader.size:
        head = reader.read(place, 8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND" or place + 12 + length > reader.size:
            return
        if kind in _TEXT and length <= _MAX_TEXT:
            keyword = reader.read(place + 8, min(length, 80)).partition(b"\0")[0].decode("latin-1")
            if keyword in ("prompt", "workflow"):
                text = _text(kind, reader.read(place + 9 + len(keyword), max(length - 1 - len(keyword), 0)), room)
                room -= len(text) + 1024
                yield keyword, text
        place += 12 + length


def _text(kind: bytes, rest: bytes, room: int) -> str:
    if kind == b"tEXt":
        return rest.decode("latin-1")
    if kind == b"zTXt":
        return _unpack(rest[1:], room).decode("latin-1")
    packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    return (_unpack(rest, room) if packed else rest).decode("utf-8", "replace")


def _unpack(data: bytes, room: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, room)
    except zlib.error:
        return b""
