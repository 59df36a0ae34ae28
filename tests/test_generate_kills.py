import json
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
from generate_kills import STEPS


@pytest.fixture(scope="module", params=[4, pytest.param(1, marks=pytest.mark.slow)])
def kills(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """What `generate_kills` reports; it compares each run's files with an unbroken run's itself."""
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("generate_kills.py"),
            tmp_path_factory.mktemp("kills"),
            str(request.param),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_run_that_is_killed_at_any_file_it_touches_ends_with_the_same_bytes(
    kills: dict[str, list[int]],
) -> None:
    answers = kills["everywhere"]
    assert answers[0] == 0 and answers[-1] == 60  # before the first answer, and after the last
    assert len(answers) >= 4


def test_a_run_that_is_killed_between_answers_asks_nothing_twice(
    kills: dict[str, list[int]],
) -> None:
    assert kills["often"] == list(accumulate(STEPS))
    # a kill comes before the engine could note the last row that was taken
    asked = kills["log"]
    assert len(asked) == len(set(asked))
    assert len(asked) >= 60 - len(kills["often"])


def test_a_full_disk_loses_no_answer(kills: dict[str, int]) -> None:
    assert 0 < kills["full"] < 60
    assert f"All {kills['full']} answers before are in it: make room" in str(kills["said"])
