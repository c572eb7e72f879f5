"""The controller of adaptive coefficients: it reduces once per step, and commits when the optimizer has stepped."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.moe.aux_loss import AdaptiveAuxLossCoefficients, check_coefficients
from nemo_skymoe.moe.router import SkyworkRouter
from nemo_skymoe.moe.telemetry import LayerMetrics, layer_metrics, reduce_sums

logger = logging.getLogger(__name__)
_KEY = "aux_loss_coefficients"


def find_routers(model_chunks: Sequence[torch.nn.Module]) -> dict[int, SkyworkRouter]:
    """Return the Skywork routers of all local (virtual) pipeline chunks by global layer number, which counts from 1.

    Raises:
        ConfigurationError: A router has no layer number, or two have the same.
    """
    routers: dict[int, SkyworkRouter] = {}
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, SkyworkRouter):
                if module.layer_number is None or module.layer_number in routers:
                    raise ConfigurationError(
                        f"a SkyworkRouter has layer number {module.layer_number}, expected one of its own: build it"
                        " inside a TransformerLayer of the decoder"
                    )
                routers[module.layer_number] = module
    return dict(sorted(routers.items()))


class AuxLossController:
    """Owner of a model's adaptive auxiliary-loss coefficients and of the metrics of the last step.

    Once per optimizer step, when Megatron finalises the gradients, the controller sums the routers' statistics over
    all micro-batches and over the tensor-, context- and data-parallel ranks. This takes one reduction for all layers.
    The coefficients (eq. 7-9) change only after the optimizer has stepped; a skipped step leaves them as they are.
    Evaluation and recomputation are never counted.

    Args:
        model_chunks: The model, one module per virtual pipeline stage, wrapped in DDP or not.

    Attributes:
        coefficients: One coefficient per local MoE layer, in the order of `layers`.
        layers: Global numbers of the local MoE layers.
        metrics: The metrics of the last committed step, by global layer number.
        drop_rate_is_virtual: True if training drops nothing. `LayerMetrics.drop_rate` is then the share that a
            capacity factor of `moe_nominal_capacity_factor` would have dropped.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        self.config = get_model_config(model_chunks[0])
        options = cast(SkyworkOptions, self.config)
        self._routers = find_routers(model_chunks)
        self.layers = tuple(self._routers)
        self.adaptive = options.moe_adaptive_aux_loss
        self.drop_rate_is_virtual = self.config.moe_expert_capacity_factor is None
        self.coefficients = AdaptiveAuxLossCoefficients(
            len(self.layers),
            options.moe_adaptive_aux_loss_sensitivity,
            options.moe_adaptive_aux_loss_maximum,
            options.moe_adaptive_aux_loss_smoothing,
            options.moe_adaptive_aux_loss_initial,
        )
        self.metrics: dict[int, LayerMetrics] = {}
        self._collected: torch.Tensor | None = None
        self._publish()

    def attach(self, optimizer: Any) -> None:
        """Follow training: collect when `config.finalize_model_grads_func` runs, commit when `optimizer.step` succeeds.

        This replaces a controller that was attached to the same model before.

        Args:
            optimizer: A Megatron optimizer, whose `step()` returns (success, gradient norm, zeros).

        Raises:
            ConfigurationError: `config.finalize_model_grads_func` is None.
        """
        if self.config.finalize_model_grads_func is None:
            raise ConfigurationError(
                "config.finalize_model_grads_func is None, expected Megatron's or NeMo's"
            )
        finalize, step = _original(self.config.finalize_model_grads_func), _original(optimizer.step)

        def finalize_and_collect(*args: Any, **kwargs: Any) -> Any:
            result = finalize(*args, **kwargs)
            self.collect()
            return result

        def step_and_commit(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if result[0]:
                self.commit()
            else:
                self.discard()
            return result

        self.config.finalize_model_grads_func = _replace(finalize, finalize_and_collect)
        optimizer.step = _replace(step, step_and_commit)
        # Micro-batches that the routers saw before belong to no step.
        for router in self._routers.values():
            router.statistics.reset()

    def collect(self) -> None:
        """Reduce the routers' sums over the ranks and reset them. The coefficients do not change before `commit`.

        Gradients may be finalised several times before the optimizer steps. Each time adds to the collected sums.
        """
        routers = list(self._routers.values())
        if routers:
            group: Any = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            sums = reduce_sums([r.statistics for r in routers], group, routers[0].weight.device)
            self._collected = sums if self._collected is None else self._collected + sums
        for router in routers:
            router.forget_micro_batches()

    def commit(self) -> None:
        """Update the coefficients from the collected drop rates, because the optimizer has stepped."""
        if self._collected is None:
            return
        self.metrics = dict(zip(self.layers, layer_metrics(self._collected), strict=True))
        if self.adaptive:
            self.coefficients.update([m.drop_rate if any(m.load) else None for m in self.metrics.values()])
            self._publish()
        self._collected = None

    def discard(self) -> None:
        """Forget the collected sums, because the optimizer has skipped the step."""
        self._collected = None

    def coefficient_by_layer(self) -> dict[int, float]:
        """Return the current coefficient of each local MoE layer, by global layer number."""
        return {n: router.get_aux_loss_coeff("aux_loss") for n, router in self._routers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the coefficients of the whole model by global layer number, or nothing if they are not adaptive.

        They are gathered over the pipeline, so every rank has to call this.
        """
        if not self.adaptive:
            return {}
        gathered: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
        local = dict(zip(self.layers, self.coefficients.values, strict=True))
        torch.distributed.all_gather_object(
            gathered, local, group=parallel_state.get_pipeline_model_parallel_group()
        )
        return {_KEY: dict(sorted(item for part in gathered for item in part.items()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the whole model's coefficients, whatever parallel layout they were saved under.

        If `state` has no coefficients, every layer starts at the initial value, and a warning says so.

        Raises:
            ConfigurationError: The MoE layers differ, or a coefficient is negative or not finite.
        """
        if not self.adaptive:
            return
        if _KEY not in state:
            logger.warning(
                "The checkpoint has no auxiliary-loss coefficients: every MoE layer starts at"
                f" {self.coefficients.initial}."
            )
            return
        saved = {int(layer): float(value) for layer, value in state[_KEY].items()}
        expected = _moe_layers(self.config)
        if sorted(saved) != expected:
            raise ConfigurationError(
                f"the checkpoint has auxiliary-loss coefficients for {len(saved)} MoE layers, the model has"
                f" {len(expected)}: {sorted(saved)} against {expected}"
            )
        check_coefficients(saved)  # all layers, so that every pipeline stage refuses
        self.coefficients.values = [saved[layer] for layer in self.layers]
        self._publish()

    def _publish(self) -> None:
        if self.adaptive:
            for router, value in zip(self._routers.values(), self.coefficients.values, strict=True):
                router.aux_loss_coefficient = value


def _replace(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    setattr(hook, "replaces", original)  # noqa: B010
    # A configuration that is saved names its functions: the one that was there can be found again, the hook cannot.
    named = original.func if isinstance(original, functools.partial) else original
    return functools.update_wrapper(hook, named, ("__module__", "__name__", "__qualname__"), ())


def _original(function: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(function, "replaces", function)


def _moe_layers(config: Any) -> list[int]:
    """Return the global numbers of all MoE layers of the model."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return list(range(1, config.num_layers + 1, frequency))
    return [layer for layer, is_moe in enumerate(frequency, start=1) if is_moe]
