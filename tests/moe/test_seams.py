"""A layer of another router or dispatcher: it is set up as its kind needs, and refused where it does not fit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.adoption import adopt
from nemo_skymoe.moe.dispatch_alltoall import AllToAllTokenDispatcher
from nemo_skymoe.moe.dispatch_replicated import ReplicatedTokenDispatcher
from nemo_skymoe.moe.layer import SkyworkMoELayer, get_skywork_block_spec
from nemo_skymoe.moe.router import SkyworkRouter
from tests.moe.worlds import Layout, configuration, generator, groups, on_ranks

LAYOUT = Layout(tp=2, ep=2)


class OwnRouter(SkyworkRouter):
    pass


class OwnReplicated(ReplicatedTokenDispatcher):
    pass


class OwnAllToAll(AllToAllTokenDispatcher):
    pass


class OffsetRouter(SkyworkRouter):
    """A router with a parameter of its own, which its author did not mark for sequence parallelism."""

    def _set_up(self) -> None:
        super()._set_up()
        self.offset = torch.nn.Parameter(torch.zeros_like(self.weight[:, 0]))

    def gating(self, input: Tensor) -> Tensor:
        return super().gating(input) + self.offset


class OffsetLayer(SkyworkMoELayer):
    router_class = OffsetRouter


class RoutedLayer(SkyworkMoELayer):
    router_class = OwnRouter


class ReplicatedLayer(SkyworkMoELayer):
    dispatcher_class = OwnReplicated


class AllToAllLayer(SkyworkMoELayer):
    dispatcher_class = OwnAllToAll


def first_layer(layer_class: type[Any], **options: Any) -> Any:
    values = {"moe_edp": True, "expert_tensor_parallel_size": 1, "sequence_parallel": True, **options}
    config = configuration(LAYOUT, **values)
    torch.manual_seed(5)
    spec = get_skywork_block_spec(config, moe_layer=layer_class)
    return GPTModel(config, spec, 32, 16, position_embedding_type="none").decoder.layers[0].mlp


def gradients(layer: Any) -> list[Tensor]:
    given = torch.randn(8, 2, 16, generator=generator("given"), dtype=torch.float64).requires_grad_()
    output, _ = layer(given)
    output.square().sum().backward()
    return [given.grad, *(parameter.grad for parameter in layer.parameters())]  # type: ignore[list-item]


@on_ranks(2)
def test_a_router_of_another_class_has_megatrons_own_initial_weights() -> None:
    with groups(LAYOUT):
        own = first_layer(RoutedLayer, moe_edp=False)
        stock = first_layer(MoELayer, moe_edp=False)
        assert type(own.router) is OwnRouter
        assert torch.equal(own.router.weight, stock.router.weight)
        for mine, theirs in zip(own.experts.parameters(), stock.experts.parameters(), strict=True):
            assert torch.equal(mine, theirs)


@on_ranks(2)
def test_a_parameter_of_a_router_of_another_class_is_summed_over_all_tokens() -> None:
    """Under sequence parallelism Megatron's reduction must take it in, or the ranks' copies drift apart."""
    with groups(LAYOUT):
        for split in (True, False):
            layer = first_layer(OffsetLayer, moe_edp=True, sequence_parallel=split)
            gradients(layer)
            layer.ddp_config = SimpleNamespace(use_custom_fsdp=False, use_megatron_fsdp=False)
            local = layer.router.offset.grad.clone()
            summed = local.clone()
            if split:
                torch.distributed.all_reduce(summed)
            for parameter in layer.parameters():
                parameter.main_grad = parameter.grad
            _allreduce_non_tensor_model_parallel_grads([layer], layer.config)
            assert local.abs().max() > 0
            assert torch.equal(layer.router.offset.main_grad, summed)


@on_ranks(2)
def test_a_dispatcher_of_another_class_is_set_up_as_its_kind() -> None:
    """The router's losses of replicated tokens must not count every rank, whatever the subclass is called."""
    with groups(LAYOUT):
        for layer_class, name in ((ReplicatedLayer, "replicated"), (AllToAllLayer, "alltoall")):
            split = name != "replicated"
            own = first_layer(layer_class, sequence_parallel=split)
            known = first_layer(SkyworkMoELayer, sequence_parallel=split, edp_dispatcher=name)
            assert type(own.token_dispatcher) is layer_class.dispatcher_class
            for mine, theirs in zip(gradients(own), gradients(known), strict=True):
                assert torch.equal(mine, theirs)


@on_ranks(2)
def test_what_does_not_fit_is_refused_by_name() -> None:
    with groups(LAYOUT):
        for layer_class, options, message in (
            (ReplicatedLayer, {}, "OwnReplicated is of the kind 'replicated': .*sequence_parallel=False"),
            (
                AllToAllLayer,
                {"sequence_parallel": False},
                "OwnAllToAll is of the kind .*needs sequence_parallel=True",
            ),
            (
                AllToAllLayer,
                {"moe_edp": False},
                "moe_edp is False, expected True with the dispatcher_class OwnAll",
            ),
            (
                AllToAllLayer,
                {"moe_capacity_scope": "edp", "moe_expert_capacity_factor": 1.0},
                "moe_capacity_scope='edp' needs every rank",
            ),
        ):
            with pytest.raises(ConfigurationError, match=message):
                first_layer(layer_class, **options)


def test_only_a_subclass_is_adopted() -> None:
    with pytest.raises(TypeError, match="str is no subclass of int"):
        adopt(3, str)
