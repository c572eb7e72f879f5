"""What the host has read from the device in the forward pass is kept for recomputation, which then reads nothing."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


class KeptReads:
    """The host's reads of one layer that recomputation will ask for again.

    A recomputed layer runs twice for a micro-batch: in the forward pass, in training mode but without gradients, and again
    inside the backward pass. Megatron's schedules run the backward passes of a model chunk in the order of its forward
    passes, so a queue keeps the values. Use `eval()` for a forward pass that no backward pass follows.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()

    def read(self, counts: Tensor, read: Callable[[], Tensor], training: bool, where: str) -> Tensor:
        """Return what `read` returns, or what it returned when the same micro-batch was here before.

        Args:
            counts: A tensor on the device that is the same in both passes. The device compares it, and nobody waits.
            read: Reads values from the device.
            training: Whether the layer is in training mode.
            where: The layer, for messages.

        Raises:
            RuntimeError: The counts differ from those of the forward pass. On a GPU, the device raises it.
        """
        if self.repeats():
            before, values = self._waiting.popleft()
            torch.ops.aten._assert_async.msg(
                (before == counts).all(),
                f"{where}: recomputation routes a micro-batch differently from its forward pass, or a forward pass in"
                " training mode and without gradients was not followed by its backward pass",
            )
            return values
        values = read()
        if training and not torch.is_grad_enabled():
            self._waiting.append((counts, values))
        return values

    def repeats(self) -> bool:
        """Say whether a layer runs for the second time: with gradients, inside a backward pass."""
        return bool(self._waiting) and torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1

    def forget(self) -> None:
        """Forget all values: no backward pass is left."""
        self._waiting.clear()
