"""Runs the adaptive coefficients over a model: reduce once per step, commit when the optimizer has stepped."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.moe.aux_loss import AdaptiveAuxLossCoefficients
from nemo_skymoe.moe.router import SkyworkRouter
from nemo_skymoe.moe.telemetry import LayerMetrics, reduce_statistics


def find_routers(model_chunks: Sequence[torch.nn.Module]) -> dict[int, SkyworkRouter]:
    """The Skywork routers of all local (virtual) pipeline chunks by global layer number, which counts from 1."""
    routers: dict[int, SkyworkRouter] = {}
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, SkyworkRouter):
                if module.layer_number is None:
                    raise ConfigurationError(
                        "a SkyworkRouter has no layer number: build it inside a TransformerLayer"
                    )
                routers[module.layer_number] = module
    return dict(sorted(routers.items()))


class AuxLossController:
    """Owner of a model's adaptive auxiliary-loss coefficients and of what its routers observed last.

    Once per optimizer step it sums the routers' statistics over all micro-batches, the tensor-, context- and
    data-parallel ranks in one reduction for all layers, when Megatron finalises the gradients. Only after the
    optimizer has stepped do the coefficients (eq. 7-9) follow; a skipped step leaves them alone. Evaluation
    and recomputation are never counted.

    Args:
        model_chunks: The model, one module per virtual pipeline stage; wrapped in DDP or not.

    Attributes:
        coefficients: One per local MoE layer, in the order of `layers`.
        layers: Global numbers of the local MoE layers.
        metrics: What the last committed step showed, by global layer number.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        self.config = get_model_config(model_chunks[0])
        options = cast(SkyworkOptions, self.config)
        self._routers = find_routers(model_chunks)
        self.layers = tuple(self._routers)
        self.adaptive = options.moe_adaptive_aux_loss
        self.coefficients = AdaptiveAuxLossCoefficients(
            len(self.layers),
            options.moe_adaptive_aux_loss_sensitivity,
            options.moe_adaptive_aux_loss_maximum,
            options.moe_adaptive_aux_loss_smoothing,
            options.moe_adaptive_aux_loss_initial,
        )
        self.metrics: dict[int, LayerMetrics] = {}
        self._staged: list[LayerMetrics] | None = None
        self._publish()

    def attach(self, optimizer: Any) -> None:
        """Follow training: stage when `config.finalize_model_grads_func` runs, commit when `optimizer.step` succeeds.

        Args:
            optimizer: A Megatron optimizer, whose `step()` returns (success, gradient norm, zeros).
        """
        finalize, step = self.config.finalize_model_grads_func, optimizer.step
        if finalize is None:
            raise ConfigurationError(
                "config.finalize_model_grads_func is None, expected Megatron's or NeMo's"
            )

        def finalize_and_stage(*args: Any, **kwargs: Any) -> Any:
            result = finalize(*args, **kwargs)
            self.stage()
            return result

        def step_and_commit(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if result[0]:
                self.commit()
            else:
                self.discard()
            return result

        self.config.finalize_model_grads_func = finalize_and_stage
        optimizer.step = step_and_commit

    def stage(self) -> None:
        """Reduce and forget the routers' sums; nothing follows from them before `commit`."""
        routers = list(self._routers.values())
        if routers:
            group = routers[0].tp_dp_cp_group
            self._staged = reduce_statistics([r.statistics for r in routers], group, routers[0].weight.device)

    def commit(self) -> None:
        """The optimizer stepped: let the coefficients follow the staged drop rates."""
        if self._staged is None:
            return
        self.metrics = dict(zip(self.layers, self._staged, strict=True))
        if self.adaptive:
            self.coefficients.update([metrics.drop_rate for metrics in self._staged])
            self._publish()
        self._staged = None

    def discard(self) -> None:
        """The optimizer skipped the step: as if its micro-batches had not been."""
        self._staged = None

    def coefficient_by_layer(self) -> dict[int, float]:
        """The coefficient in force in each local MoE layer, by global layer number."""
        return {n: router.get_aux_loss_coeff("aux_loss") for n, router in self._routers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Coefficients of the whole model keyed by global layer number: gathered over the pipeline, so every rank calls."""
        gathered: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
        local = dict(zip(self.layers, self.coefficients.values, strict=True))
        torch.distributed.all_gather_object(
            gathered, local, group=parallel_state.get_pipeline_model_parallel_group()
        )
        return {"aux_loss_coefficients": dict(_sorted_items(gathered))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take this rank's layers from the whole model's coefficients; refuses another number of MoE layers."""
        saved = {int(layer): float(value) for layer, value in state["aux_loss_coefficients"].items()}
        expected = set(_sorted_layers(self.config))
        if set(saved) != expected:
            raise ConfigurationError(
                f"the checkpoint has auxiliary-loss coefficients for {len(saved)} MoE layers, the model has"
                f" {len(expected)}"
            )
        self.coefficients.load_state_dict({"aux_loss_coefficients": [saved[layer] for layer in self.layers]})
        self._publish()

    def _publish(self) -> None:
        if self.adaptive:
            for router, value in zip(self._routers.values(), self.coefficients.values, strict=True):
                router.aux_loss_coefficient = value


def _sorted_items(gathered: Sequence[Mapping[int, float]]) -> Iterator[tuple[int, float]]:
    yield from sorted(item for part in gathered for item in part.items())


def _sorted_layers(config: Any) -> list[int]:
    """Global numbers of all MoE layers of the model."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        pattern = [int(layer % frequency == 0) for layer in range(config.num_layers)]
    else:
        pattern = list(frequency)
    return [layer for layer, is_moe in enumerate(pattern, start=1) if is_moe]
