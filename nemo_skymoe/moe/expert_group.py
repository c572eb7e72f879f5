"""The ranks that share a layer's experts and the collectives among them. A failure names the layer and the group.

On a GPU a collective fails after the call that began it has returned, often while the host is layers ahead. The error then
comes out of whatever the host asks for next. So a group remembers what it has begun, until it sees the end of it, and a
failure is put down to the earliest collective that has not ended.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


class CollectiveFailed(RuntimeError):
    """A collective of an MoE layer did not complete. The message names the layer, the collective and the group."""


class Begun:
    """A collective that has begun. `wait` returns its result, which nobody may touch before.

    Args:
        result: What the collective writes.
        ranks: The group; None for a result that is there already.
        collective: The collective's name.
        sent: What the collective reads, which has to stay until it has ended.
    """

    def __init__(
        self,
        result: Tensor,
        ranks: "ExpertGroup | None" = None,
        collective: str = "",
        sent: Tensor | None = None,
    ) -> None:
        self.result = result
        self.ranks = ranks
        self.collective = collective
        self.work: Any = None
        self._sent = sent
        self._end: Any = None
        self.over = ranks is None

    def wait(self) -> Tensor:
        """Return the result. What this device does next sees it; on the CPU the host waits for it."""
        if self.work is not None and self.ranks is not None:
            with self.ranks.failures_named(self):
                self.work.wait()
            self._end = end_on_device(self.result)
            self.over = self._end is None
            self.work = self._sent = None
        # What a group remembers must not keep memory.
        result, self.result = self.result, torch.empty(0, device="meta")
        return result

    def what(self) -> str:
        """Return the layer, the group and the collective, in words."""
        return f"{self.ranks}: {self.collective}"

    def has_ended(self) -> bool:
        """Say whether the collective has ended, as far as the host sees without waiting."""
        self.over = self.over or (self._end is not None and self._end.query())
        return self.over


def end_on_device(result: Tensor) -> Any:
    """Return an event at the end of a collective for which a GPU waits; None where the host has waited itself."""
    if not result.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record()
    return event


_BEGUN: WeakKeyDictionary[ProcessGroup, deque[Begun]] = WeakKeyDictionary()
"""What was begun in each group and has not been seen to end. Layers share a group, which runs collectives in order."""


class ExpertGroup:
    """The ranks that share a layer's experts, and the collectives among them.

    Every method takes a tensor and returns a new contiguous one, or the tensor itself if the group is one rank. The
    methods that begin a collective return at once. A collective that fails raises `CollectiveFailed`: another rank of the
    group has died, or does not take part within the group's timeout.

    Args:
        group: The EDP group: Megatron's tensor-parallel or expert-parallel group, whose ranks are the same.
        layer_number: Returns the number of the layer. It is called only when a collective has failed.
    """

    def __init__(self, group: ProcessGroup, layer_number: Callable[[], int | None]) -> None:
        self.group = group
        self.size = group.size()
        self.rank = group.rank()
        self._layer_number = layer_number
        self._begun = _BEGUN.setdefault(group, deque())

    def __str__(self) -> str:
        ranks = distributed.get_process_group_ranks(self.group)
        return f"MoE layer {self._layer_number()}, EDP group of ranks {ranks}"

    @contextmanager
    def failures_named(self, noticed: Begun | None = None) -> Iterator[None]:
        """Put a failure inside the `with` block down to the earliest collective that has not ended.

        Args:
            noticed: The collective that is begun or waited for inside; None where the host reads from the device.
        """
        try:
            yield
        except RuntimeError as error:
            first = next((one for one in self._begun if not one.over), noticed)
            if first is None:
                raise
            late = "" if first is noticed else f", noticed at {self if noticed is None else noticed.what()}"
            raise CollectiveFailed(
                f"{first.what()} failed on rank {distributed.get_rank()}{late}, a partner has died or is late: {error}"
            ) from error

    def _begin(self, collective: str, result: Tensor, sent: Tensor, function: Any, *args: Any) -> Begun:
        begun = Begun(result, self, collective, sent)
        self._begun.append(begun)
        with self.failures_named(begun):
            begun.work = function(*args, group=self.group, async_op=True)
        # Only now: after a failure NCCL aborts, and what a device waited for ends as if it had been done.
        while self._begun[0].has_ended():
            self._begun.popleft()
        return begun

    def begin_all_reduce(self, tensor: Tensor) -> Begun:
        """Begin to sum over the ranks."""
        if self.size == 1:
            return Begun(tensor)
        result = tensor.clone(memory_format=torch.contiguous_format)
        return self._begin("all-reduce", result, result, distributed.all_reduce, result)

    def begin_all_gather(self, tensor: Tensor) -> Begun:
        """Begin to concatenate each rank's [r, ...] to [size * r, ...], in rank order."""
        if self.size == 1:
            return Begun(tensor)
        result = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        sent = tensor.contiguous()
        return self._begin("all-gather", result, sent, _gather_into(), result, sent)

    def begin_reduce_scatter(self, tensor: Tensor) -> Begun:
        """Begin to sum [size * r, ...] over the ranks, of which this rank gets its part [r, ...]."""
        if self.size == 1:
            return Begun(tensor)
        result = tensor.new_empty(tensor.shape[0] // self.size, *tensor.shape[1:])
        sent = tensor.contiguous()
        return self._begin("reduce-scatter", result, sent, _reduce_scatter_into(), result, sent)

    def begin_all_to_all(
        self, tensor: Tensor, received: Sequence[int] | None = None, sent: Sequence[int] | None = None
    ) -> Begun:
        """Begin to send the i-th piece of dimension 0 to rank i, as `all_to_all` does."""
        if self.size == 1:
            return Begun(tensor)
        rows = tensor.shape[0] if received is None else sum(received)
        result, source = tensor.new_empty(rows, *tensor.shape[1:]), tensor.contiguous()
        splits = _list(received), _list(sent)
        return self._begin(
            "all-to-all", result, source, distributed.all_to_all_single, result, source, *splits
        )

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        return self.begin_all_reduce(tensor).wait()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate each rank's [r, ...] to [size * r, ...], in rank order."""
        return self.begin_all_gather(tensor).wait()

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum [size * r, ...] over the ranks, and return this rank's part [r, ...] of the sum."""
        return self.begin_reduce_scatter(tensor).wait()

    def all_to_all(
        self, tensor: Tensor, received: Sequence[int] | None = None, sent: Sequence[int] | None = None
    ) -> Tensor:
        """Send the i-th piece of dimension 0 to rank i.

        Args:
            tensor: [sum(sent), ...].
            received: The number of rows from each rank; None for equal pieces.
            sent: The number of rows to each rank; None for equal pieces.

        Returns:
            [sum(received), ...].
        """
        return self.begin_all_to_all(tensor, received, sent).wait()

    def read(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the host, which waits for it and for every collective before it."""
        with self.failures_named():
            return tensor.cpu()


def _list(splits: Sequence[int] | None) -> list[int] | None:
    return None if splits is None else list(splits)


def _gather_into() -> Any:
    # torch 2.13 renames both and warns of the old names at every call.
    return getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)


def _reduce_scatter_into() -> Any:
    return getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)
