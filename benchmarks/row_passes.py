"""Count how often kernels go over hidden rows, outside experts and collectives. Shares no code with nemo_skymoe.

A pass is one kernel that reads or writes rows. Its bytes are those of the rows that it reads, and of those that it writes.
What adds to rows in place reads and writes as many of them as it adds.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = frozenset({"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"})
COLLECTIVES = frozenset({"c10d", "_c10d_functional"})
ADDITIONS = frozenset({"index_add", "index_add_", "scatter_add", "scatter_add_"})


class RowPasses(TorchDispatchMode):
    """Passes over rows of `hidden` elements while it is entered, but for what `outside` says.

    Attributes:
        kernels: Their names, in order.
        moved: Bytes that they read and write.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.kernels: list[str] = []
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if func.namespace in COLLECTIVES or func.namespace == "outside" or name in ALLOCATIONS:
            return result
        read, written = self._rows((args, *kwargs.values())), self._rows((result,))
        given = {_memory(tensor) for tensor in _tensors((args, *kwargs.values()))}
        view = not func._schema.is_mutable and any(_memory(rows) in given for rows in written)
        if not read + written or view:
            return result
        self.kernels.append(name)
        self.moved += _bytes(name, read, written)
        return result

    def _rows(self, values: Any) -> list[Tensor]:
        return [
            tensor
            for tensor in _tensors(values)
            if tensor.dim() >= 2 and tensor.shape[-1] == self.hidden and tensor.is_floating_point()
        ]


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [one for value in values for one in _tensors(value)] if isinstance(values, list | tuple) else []


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(name: str, read: list[Tensor], written: list[Tensor]) -> int:
    if name == "index_select":
        return 2 * written[0].nbytes
    if name in ADDITIONS:
        # The target is copied first unless it is given to be changed.
        copied = 0 if name.endswith("_") else 2 * written[0].nbytes
        return copied + 3 * read[-1].nbytes
    if name.endswith("_"):
        return sum(rows.nbytes for rows in read[1:]) + read[0].nbytes
    return sum(rows.nbytes for rows in read + written)


class StandInExperts(torch.nn.Module):
    """Experts whose work does not count: each row times its weight, in operations that `RowPasses` leaves out."""

    def forward(self, rows: Tensor, tokens_per_expert: Any, weights: Tensor) -> tuple[Tensor, None]:
        """Rows [P, H] times weights [P], and no bias."""
        return _Outside.apply(rows, weights), None  # type: ignore[return-value]


@torch.library.custom_op("outside::scale", mutates_args=())
def scale(rows: Tensor, weights: Tensor) -> Tensor:
    """Scale each row by its weight, in the rows' dtype."""
    return (rows * weights.unsqueeze(-1)).to(rows.dtype)


@torch.library.custom_op("outside::dot", mutates_args=())
def dot(gradient: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of the weights."""
    return (gradient * rows).sum(dim=-1).to(weights.dtype)


class _Outside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return scale(rows, weights)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        rows, weights = ctx.saved_tensors
        return scale(gradients[0], weights), dot(gradients[0], rows, weights)
