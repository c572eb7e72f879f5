"""`torch.cuda` without a GPU: device, streams, events and the random generator."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .targets import replace


class Stream:
    """Inert stand-in for a CUDA stream: on the CPU, work is finished when its call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cpu")

    def record(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> "Stream":
        return self

    def synchronize(self) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_: Any) -> float:
        return 0.0


class Event(Stream):
    """Inert stand-in for a CUDA event."""


@contextlib.contextmanager
def _stream_context(_: Any = None) -> Iterator[None]:
    yield


def _answer(value: Any) -> Callable[..., Any]:
    # A new function for each name: Dynamo takes one object under two names of torch for an error.
    return lambda *_, **__: value


def current_device() -> None:
    """`torch.cuda.current_device()` raises: p2p_communication.py, mappings.py and more take their device from it."""
    replace(torch.cuda, "current_device", _answer(torch.device("cpu")))
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, _answer(None))


def streams() -> None:
    """Streams and events raise: NeMo's init_model_parallel, param_and_grad_buffer.py and token_dispatcher.py use them."""
    stream = Stream()
    for name, stand_in in {
        "Stream": Stream,
        "Event": Event,
        "stream": _stream_context,
        "set_stream": _answer(None),
        "current_stream": _answer(stream),
        "default_stream": _answer(stream),
    }.items():
        replace(torch.cuda, name, stand_in)
    replace(torch.Tensor, "record_stream", _answer(None))


def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    """Return the state of the CPU generator, whatever device is asked for."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    """Give the CPU generator a `state` of `get_rng_state`."""
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _manual_seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def random_generator() -> None:
    """tensor_parallel/random.py forks the CUDA generator for dropout and recomputation: here the CPU generator."""
    for module in (torch.cuda, torch.cuda.random):
        replace(module, "get_rng_state", get_rng_state)
        replace(module, "set_rng_state", set_rng_state)
        replace(module, "manual_seed", _manual_seed)
        replace(module, "manual_seed_all", _manual_seed_all)


SUBSTITUTIONS = (current_device, streams, random_generator)
