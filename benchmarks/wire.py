"""Count what a rank sends and where its host waits, by watching the calls. Shares no code with nemo_skymoe.

Bytes follow the ring convention: to gather or to reduce-scatter a piece a rank sends it n - 1 times, an
all-reduce is both, an all-to-all sends every piece but its own.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor, distributed
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary


class Wire:
    """Bytes and calls by collective, while `watching`."""

    def __init__(self) -> None:
        self.sent = 0.0
        self.calls: Counter[str] = Counter()
        self._inside = False

    @contextmanager
    def watching(self) -> Iterator["Wire"]:
        """Count every collective of torch.distributed; one that is not understood is an error."""
        counters = {
            "all_reduce": _all_reduce,
            "all_gather_into_tensor": _all_gather,
            "all_gather_single": _all_gather,
            "reduce_scatter_tensor": _reduce_scatter,
            "reduce_scatter_single": _reduce_scatter,
            "all_to_all_single": _all_to_all,
        }
        unknown = ("all_gather", "all_to_all", "broadcast", "gather", "scatter", "reduce", "reduce_scatter")
        unknown += ("send", "recv", "isend", "irecv", "batch_isend_irecv", "all_gather_coalesced")
        places = [(distributed, name, count) for name, count in counters.items()]
        places += [(distributed, name, _refuse) for name in unknown]
        places += [
            (mappings, "dist_all_gather_func", _all_gather),
            (mappings, "dist_reduce_scatter_func", _reduce_scatter),
        ]
        patches = [
            mock.patch.object(place, name, self._counting(getattr(place, name), count))
            for place, name, count in places
            if hasattr(place, name)
        ]
        for patch in patches:
            patch.start()
        try:
            yield self
        finally:
            for patch in patches:
                patch.stop()

    def _counting(self, function: Callable[..., Any], count: Callable[..., float]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            # Old names of collectives call the new ones.
            if self._inside:
                return function(*args, **kwargs)
            self.sent += count(*args, **kwargs)
            self.calls[count.__name__.strip("_")] += 1
            self._inside = True
            try:
                # What gloo does on the way, such as copying, is not an operation of the layer.
                with _disable_current_modes():
                    work = function(*args, **kwargs)
                return None if work is None else _Quiet(work)
            finally:
                self._inside = False

        return counted


class _Quiet:
    """The handle of a collective that has begun; waiting is no operation of the layer either."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        with _disable_current_modes():
            self._work.wait()


def _all_reduce(tensor: Tensor, *_: Any, group: Any = None, **__: Any) -> float:
    size = distributed.get_world_size(group)
    return 2 * (size - 1) / size * tensor.nbytes


def _all_gather(output: Tensor, input: Tensor, *_: Any, group: Any = None, **__: Any) -> float:
    return (distributed.get_world_size(group) - 1) * input.nbytes


def _reduce_scatter(output: Tensor, input: Tensor, *_: Any, group: Any = None, **__: Any) -> float:
    return (distributed.get_world_size(group) - 1) * output.nbytes


def _all_to_all(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: Any = None,
    **_: Any,
) -> float:
    size, rank = distributed.get_world_size(group), distributed.get_rank(group)
    rows = input.shape[0]
    own = rows // size if input_split_sizes is None else int(input_split_sizes[rank])
    return input.nbytes * (rows - own) / rows if rows else 0.0


def _refuse(*_: Any, **__: Any) -> float:
    raise NotImplementedError("this collective is not counted")


class HostReads(TorchFunctionMode):
    """Count where a GPU run's host would wait for the device, in a run on the CPU.

    That is: reading a value (`item`, `tolist`, `cpu`, truth, ...) and every operation whose result's shape
    depends on values. Tensors that a GPU run has on the host anyway do not count: copies made by `cpu()`,
    tensors created without a device or on "cpu" by name, and what is computed from these alone.
    """

    READS = frozenset(
        {
            Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__,
            Tensor.__float__, Tensor.__index__, Tensor.nonzero, torch.nonzero, Tensor.masked_select,
            torch.masked_select, torch.unique, Tensor.unique, torch.bincount, Tensor.bincount,
        }
    )  # fmt: skip
    FACTORIES = frozenset({torch.full, torch.zeros, torch.ones, torch.arange, torch.tensor, torch.empty})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._on_host = WeakIdKeyDictionary()

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Count in backward passes too, which autograd runs outside the mode: in functions written in Python."""
        apply = BackwardCFunction.apply

        def watched(function: Any, *gradients: Any) -> Any:
            with self:
                return apply(function, *gradients)

        with mock.patch.object(BackwardCFunction, "apply", watched):
            yield

    def mark(self, tensor: Tensor) -> Tensor:
        """Count no read of this tensor."""
        self._on_host[tensor] = True
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [part for part in _flat(args) + _flat(kwargs.values()) if isinstance(part, Tensor)]
        on_host = all(tensor in self._on_host for tensor in inputs)
        if inputs and not on_host and self._waits(func, args, kwargs):
            self.count += 1
        result = func(*args, **kwargs)
        if inputs and not on_host and self._moves(func, args, kwargs):
            # On the CPU it would be the same tensor, and count as on the host from its beginning.
            result, on_host = result.clone(), True
        if not inputs:
            on_host = func in self.FACTORIES and kwargs.get("device") in (None, "cpu")
        if on_host:
            for part in _flat((result,)):
                if isinstance(part, Tensor):
                    self.mark(part)
        return result

    def _waits(self, func: Any, args: Any, kwargs: Any) -> bool:
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in _flat((args[1],)))
        if func in (torch.repeat_interleave, Tensor.repeat_interleave):
            return len(args) > 1 and isinstance(args[1], Tensor) and "output_size" not in kwargs
        return func in self.READS or self._moves(func, args, kwargs)

    def _moves(self, func: Any, args: Any, kwargs: Any) -> bool:
        named = [part for part in (*args[1:], *kwargs.values()) if isinstance(part, str)]
        return func is Tensor.cpu or (func is Tensor.to and "cpu" in named)


def _flat(values: Any) -> list[Any]:
    return [
        leaf for value in values for leaf in (_flat(value) if isinstance(value, tuple | list) else [value])
    ]
