"""Small benchmark files in the shapes of the published ones, with questions of our own."""

import csv
import json
from pathlib import Path
from typing import Any

from punkt import provide_sentence_model

SUBJECTS = ("anatomy", "virology", "marketing")

# IFEval's columns; the first instruction is of a kind that a random model sometimes follows.
IFEVAL = [
    {
        "key": 1,
        "prompt": "Name a colour without any comma.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
    {
        "key": 2,
        "prompt": "Describe the sea in at least 20 words, in lower case.",
        "instruction_id_list": ["length_constraints:number_words", "change_case:english_lowercase"],
        "kwargs": [{"relation": "at least", "num_words": 20}, {}],
    },
    {
        "key": 3,
        "prompt": "Say why it rains, in 2 sentences.",
        "instruction_id_list": ["length_constraints:number_sentences"],
        "kwargs": [{"relation": "at least", "num_sentences": 2}],
    },
]
# MATH-500's columns; the second answer is no integer.
MATH = [
    {
        "problem": f"What is {a} + {b}?",
        "solution": f"It is $\\boxed{{{answer}}}$.",
        "answer": answer,
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": f"test/prealgebra/{i}.json",
    }
    for i, (a, b, answer) in enumerate([("1", "2", "3"), ("x", "x", "2x"), ("20", "22", "42")])
]
TASK = """
task: tiny_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/task.jsonl"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: response
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def mmlu_rows(subject: str, num_rows: int) -> list[dict[str, Any]]:
    """Questions of varied length; some need quoting."""
    return [
        {"question": f"{subject}: {'what, ' * (i % 3)}is {i}?\nSay."}
        | {f"choice{k}": f"{'no' * k} {i + k}" for k in range(4)}
        | {"answer": i % 4}
        for i in range(num_rows)
    ]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with their keys as the first line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_benchmarks(folder: Path) -> None:
    """`mmlu/` (5 examples and 7 questions a subject), `ifeval.jsonl`, `math.jsonl`, `task.yaml`."""
    for subject in SUBJECTS:
        write_csv(folder / "mmlu" / "dev" / f"{subject}_dev.csv", mmlu_rows(subject, 5))
        write_csv(folder / "mmlu" / "test" / f"{subject}_test.csv", mmlu_rows(subject, 7))
    own = [{"prompt": f"Say {word}.", "response": word} for word in ("yes", "no", "maybe")]
    for name, rows in (("ifeval", IFEVAL), ("math", MATH), ("task", own)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    provide_sentence_model(folder / "nltk_data")
    (folder / "task.yaml").write_text(TASK.format(folder=folder))
