"""Adam as Megatron-Core knows it from Apex and Transformer Engine, for the CPU.

Without those two Megatron-Core falls back to torch's AdamW, which keeps a 0-dim `step` tensor
beside the moments of each parameter. The distributed optimizer takes every such tensor for one of the
parameter's shape, so that (optimizer/distrib_optimizer.py, 0.15.3; 0.16.1 has the last two)

- saving fails: `AssertionError: (torch.Size([]), 0, 16384)` in `sharded_param_state_dp_reshardable`;
- loading into a new optimizer fails: `assert len(steps) == 1` in `state_dict`, there is no state yet;
- loading into a used one fails: `KeyError: 'step'` in `_set_main_param_and_optimizer_states`.

FusedAdam keeps the count in the parameter group instead, as Apex does; checkpoints of both
optimizers then have the layout they have on a GPU.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Adam):
    """torch's Adam with the number of steps in `group["step"]`, where Apex's FusedAdam has it.

    Args:
        params: Parameters or parameter groups.
        adam_w_mode: Whether weight decay is decoupled (AdamW). Otherwise it is L2 regularisation.
        kwargs: Further arguments of `torch.optim.Adam` (2.7 or later).
    """

    def __init__(self, params: Iterable[Any], adam_w_mode: bool = True, **kwargs: Any) -> None:
        super().__init__(params, decoupled_weight_decay=adam_w_mode, **kwargs)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        self._lend_steps(self.param_groups, self.state)
        loss = super().step(closure)
        self._take_steps_back()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, also that of torch's own AdamW, with its steps."""
        self._lend_steps(state["param_groups"], state["state"])
        super().__setstate__(state)
        self._take_steps_back()

    @staticmethod
    def _lend_steps(groups: list[dict[str, Any]], moments: dict[torch.Tensor, dict[str, Any]]) -> None:
        # torch looks for the count beside the moments, and wants a tensor of its own for each parameter.
        for group in groups:
            for parameter in group["params"]:
                if moments.get(parameter):
                    # Before the first step Megatron-Core 0.14 (optimizer.py, `_synchronize_steps`) writes None there.
                    moments[parameter].setdefault("step", torch.tensor(float(group.get("step") or 0)))

    def _take_steps_back(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.state.get(parameter):
                    group["step"] = int(self.state[parameter].pop("step"))
