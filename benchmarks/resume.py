"""Kill runs at random moments, resume each by its own command, and compare every bit.

    python benchmarks/resume.py --kills 10

A tiny random Llama is trained for 60 steps on one process and on two (FSDP2), with accumulation,
measurements and a checkpoint every 3 steps; all its processes get SIGKILL the given number of
times, each at a random moment after a random step. Then its losses, measurements and final weights
are compared with those of a run that nobody killed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def main() -> int:
    """Print one row a combination; the exit status is 1 if any run differs."""
    from kills import OPTIMIZERS, differences, resume_args, run_killed
    from ranks import run
    from tiny_run import metrics_of, write_world

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="kills a combination")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("| method | optimizer | processes | killed after step | steps compared | differing |")
    print("|---|---|---|---|---|---|", flush=True)
    num_differing = 0
    for method in ("full", "lora"):
        for optimizer in OPTIMIZERS:
            for num in (1, 2):
                with tempfile.TemporaryDirectory() as folder:
                    world = write_world(Path(folder))
                    parts = (method, optimizer, num, 6 * given.kills)
                    run(resume_args(world, "whole", *parts), num, world / "whole-said")
                    began = time.perf_counter()
                    steps = run_killed(
                        resume_args(world, "killed", *parts), num, world / "killed", given.kills,
                        given.seed, world / "said",
                    )  # fmt: skip
                    found = differences(world / "killed", world / "whole")
                    num_steps = len(metrics_of(world / "whole"))
                print(
                    f"| {method} | {optimizer} | {num} | {', '.join(map(str, steps))} "
                    f"| {num_steps} | {', '.join(found) or 'none'} |",
                    f"{time.perf_counter() - began:.0f} s",
                    flush=True,
                )
                num_differing += bool(found)
    return int(num_differing > 0)


if __name__ == "__main__":
    sys.exit(main())
