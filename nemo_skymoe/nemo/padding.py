"""Remember NeMo's batches, whose padding NeMo tells no router about."""
# No `from __future__ import annotations`: NeMo-Run reads these signatures.

from collections.abc import Iterator
from typing import Any


class Remembering:
    """A dataloader's iterator that keeps its last batch. A data step hands on only what its stage needs."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.last: Any = None

    def __iter__(self) -> "Remembering":
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self.last = batch[0] if isinstance(batch, tuple) else batch
        return batch
