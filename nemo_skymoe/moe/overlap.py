"""Overlap (appendix B.3): a micro-batch is exchanged in two halves, and one travels while the experts compute the other.

Everything about the whole micro-batch is decided before it is split: its routing, what a capacity drops, and what the host
reads. In the backward pass the halves take the same turns in reverse, see `collectives.Exchange`.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from nemo_skymoe.moe.collectives import Exchange
from nemo_skymoe.moe.dispatcher import EdpTokenDispatcher, Half
from nemo_skymoe.moe.expert_group import ExpertGroup

Experts = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class OverlappedTokenDispatcher(MoETokenDispatcher):
    """Runs one of the EDP dispatchers on two halves of a micro-batch.

    Both halves are under way before anything is waited for. The experts' work on the first hides the second's way to them,
    and that on the second hides the first's way back. Megatron's layer calls the experts between `dispatch_postprocess` and
    `combine_preprocess`, with the second half; `dispatch_postprocess` calls them with the first.

    Args:
        dispatcher: The dispatcher of the layer.
        groups: The process groups that it was made with.
        experts: Calls the layer's experts.
    """

    def __init__(self, dispatcher: EdpTokenDispatcher, groups: Any, experts: Experts) -> None:
        super().__init__(dispatcher.config, groups)
        self.dispatcher = dispatcher
        self._experts = experts
        self._parts: tuple[EdpTokenDispatcher, EdpTokenDispatcher]
        self._back: list[Exchange]

    @property
    def ranks(self) -> ExpertGroup:
        """The ranks that share the experts."""
        return self.dispatcher.ranks

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Any, None]:
        """Decide about the whole micro-batch, and split it."""
        return self.dispatcher.split(tokens, routing_map, probs), None

    def token_dispatch(self, hidden_states: Any, probs: None) -> tuple[Any, None]:
        """Begin to send both halves, and count what their experts get."""
        halves: list[Half] = hidden_states
        under_way = [half.dispatcher.begin_dispatch(half.rows, half.weights) for half in halves]
        parts = [half.dispatcher for half in halves]
        self.dispatcher.count(parts, [half.weights for half in halves])
        return list(zip(parts, under_way, strict=True)), None

    def dispatch_postprocess(self, hidden_states: Any, probs: None) -> tuple[Tensor, Tensor, Tensor]:
        """Let the experts compute the first half, begin to send it back, and return what they take of the second."""
        (first, first_on_its_way), (second, second_on_its_way) = hidden_states
        outputs, bias = self._experts(*_arrived(first, first_on_its_way))
        assert bias is None, "experts of an MoE layer add their biases themselves"
        on_its_way_back = first.begin_combine(first.combine_preprocess(outputs))
        self._parts = first, second
        self._back = [on_its_way_back]
        return _arrived(second, second_on_its_way)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the outputs of the second half's experts for each of its rows."""
        return self._parts[1].combine_preprocess(hidden_states)

    def token_combine(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Begin to send the second half back, and wait for both."""
        first, second = self._back.pop(), self._parts[1].begin_combine(hidden_states)
        return first.end(), second.end()

    def combine_postprocess(self, hidden_states: tuple[Tensor, Tensor]) -> Tensor:
        """Put the halves together to the layer's output [S, B, H]."""
        return self.dispatcher.join(self._parts, hidden_states)


def _arrived(
    part: EdpTokenDispatcher, on_its_way: tuple[Exchange, Exchange]
) -> tuple[Tensor, Tensor, Tensor]:
    rows, weights = on_its_way
    return part.dispatch_postprocess(rows.end(), weights.end())
