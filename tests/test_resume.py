from pathlib import Path

import pytest
from kills import OPTIMIZERS, differences, resume_args, run_killed
from ranks import run
from tiny_run import write_world


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("method", "num", "optimizer"),
    [
        *((*how, name) for how in [("full", 1), ("full", 2), ("lora", 2)] for name in OPTIMIZERS),
        ("lora", 3, "AdamW"),  # where 4 packs do not go round
    ],
)
def test_a_run_that_is_killed_twice_ends_bit_for_bit_as_one_that_was_not(
    tmp_path: Path, method: str, num: int, optimizer: str
) -> None:
    world = write_world(tmp_path)
    whole = resume_args(world, "whole", method, optimizer, num, max_steps=14)
    run(whole, num, tmp_path / "whole-said")
    killed = resume_args(world, "killed", method, optimizer, num, max_steps=14)
    steps = run_killed(killed, num, world / "killed", 2, seed=num, output=tmp_path / "said")
    assert len(steps) == 2
    assert differences(world / "killed", world / "whole") == []
