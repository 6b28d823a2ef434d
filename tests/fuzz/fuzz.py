"""Search for bytes that break a target, led by which lines of the package they reach.

    pip install atheris                                       # Linux, CPython; not among the project's needs
    python tests/fuzz/fuzz.py header --seconds 900 --new /tmp/found-header
    python tests/fuzz/fuzz.py header --seconds 60 --keep /tmp/found-header    # add to corpus/ what reaches new lines

Stops at the first failure and leaves its bytes in ``crash-...``: mend it, and copy the file into corpus/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import FrameType

import atheris

os.environ.setdefault("ALKAHEST_CACHE", tempfile.mkdtemp(prefix="alkahest-fuzz-cache-"))
HERE = Path(__file__).parent
WORDS = {
    "header": [
        "__metadata__",
        "data_offsets",
        "dtype",
        "shape",
        "BF16",
        "F8_E4M3",
        "I8",
        "U8",
        "weight_scale",
        "comfy_quant",
        "scaled_fp8",
        "scale_weight",
        "_quantization_metadata",
        "model.diffusion_model.",
        "nvfp4",
        "mxfp8",
        "int8_tensorwise",
        "convrot",
    ],
    "recipe": [
        "base",
        "variant",
        "lerp(",
        "weighted_sum(",
        ".protect('refiner')",
        ".only('layers')",
        ".without(",
        ".scaled({",
        "param('k', 1.0)",
        "ties([",
        "dare(",
        "della(",
        "sce(",
        "nuslerp(",
        "karcher(",
        "alkahest.",
        "extract_lora(",
        "1e308",
        "--",
        "\\\\",
    ],
    "workflow": [
        "class_type",
        "inputs",
        "ModelMergeAdd",
        "ModelMergeSubtract",
        "ModelMergeSimple",
        "ModelMergeBlocks",
        "ModelSave",
        "CheckpointSave",
        "UNETLoader",
        "CheckpointLoaderSimple",
        "LoraLoaderModelOnly",
        "nodes",
        "links",
        "definitions",
        "subgraphs",
        "widgets_values",
        "AlkahestMerge",
        "multiplier",
        "ratio",
        "PrimitiveFloat",
    ],
    "lora": [
        "lora_unet_",
        "diffusion_model.",
        "transformer.",
        "lycoris_",
        ".lora_down.weight",
        ".lora_up.weight",
        ".lora_A.weight",
        ".lora_B.weight",
        ".alpha",
        ".dora_scale",
        ".hada_w1_a",
        ".lokr_w1",
        ".lokr_w2_a",
        ".diff",
        ".diff_b",
        "layers.0.attention.to_q",
        "layers_0_attention_to_q",
        "lora_adapter_metadata",
        "r",
        "lora_alpha",
    ],
    "config": [
        "[[stage]]",
        "[[run]]",
        "[[check]]",
        "steps = ",
        "lr = ",
        "mix = {",
        "base = ",
        "prompts = [",
        "inf",
        "nan",
    ],
    "index": ["weight_map", "metadata", "total_size", ".safetensors", "-00001-of-", "../", "weight_block_size", "null"],
    "output": [
        "recipe",
        "inputs",
        "output",
        "blake3",
        "bytes",
        "file",
        "dtype",
        "layout",
        "rounding",
        "metadata",
        "drop",
    ],
    "name": ["~", "/", "..", "\\x00", "\\x1b[2J", "\\xff", "hf://", ".safetensors", ".index.json", "models--"],
}


def keep(target: str, found: Path, corpus: Path) -> None:
    """Copy what reaches lines that the corpus does not, the smallest first."""
    import targets

    reached: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> object:
        if "alkahest" not in frame.f_code.co_filename:
            return None
        if event == "line":
            reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    for path in [*sorted(corpus.iterdir()), *sorted(found.iterdir(), key=lambda path: path.stat().st_size)]:
        before = len(reached)
        sys.settrace(trace)
        targets.attempt(target, path.read_bytes())
        sys.settrace(None)
        if path.parent == found and len(reached) > before:
            shutil.copy(path, corpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(WORDS))
    parser.add_argument("--seconds", type=int, default=900)
    parser.add_argument("--new", type=Path, default=Path("found"), help="folder for what is found on the way")
    parser.add_argument("--keep", type=Path, help="add what reaches new lines to the corpus, and stop")
    options = parser.parse_args()
    with atheris.instrument_imports(include=["alkahest"]):
        sys.path.insert(0, str(HERE))
        import targets
    targets.models()  # made before anything is measured
    corpus = HERE / "corpus" / options.target
    corpus.mkdir(parents=True, exist_ok=True)
    if options.keep:
        keep(options.target, options.keep, corpus)
        return
    options.new.mkdir(parents=True, exist_ok=True)
    words = options.new.with_suffix(".words")
    words.write_text("".join('"' + word.replace('"', '\\"') + '"\n' for word in WORDS[options.target]))
    arguments = [
        sys.argv[0],
        f"-dict={words}",
        "-timeout=20",
        "-rss_limit_mb=4096",
        "-max_len=20000",
        "-print_final_stats=1",
    ]

    def one(data: bytes) -> None:
        targets.attempt(options.target, data)

    atheris.Setup([*arguments, f"-max_total_time={options.seconds}", str(options.new), str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
