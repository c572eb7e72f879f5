"""The layer specs in plain Megatron-Core: what they build, and that it trains."""

from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, mappings
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.controller import AuxLossController
from nemo_skymoe.moe.layer import SkyworkMoELayer, get_skywork_block_spec, get_skywork_moe_layer_spec
from nemo_skymoe.moe.norm import RMSNorm
from nemo_skymoe.moe.router import SkyworkRouter
from tests.cases import every
from tests.moe.worlds import Layout, build, configuration, generator, groups, model_chunk, on_ranks

VOCABULARY, LENGTH = 32, 16


def class_to_build(mlp: Any) -> type[Any]:
    """What a spec or, from megatron-core 0.18, a partial function builds; for an MLP that is a method of the class."""
    builder = getattr(mlp, "func", None)
    return mlp.module if builder is None else getattr(builder, "__self__", builder)


@on_ranks(1)
def test_layer_spec() -> None:
    moe: Any = get_skywork_moe_layer_spec(configuration()).submodules
    dense: Any = get_skywork_moe_layer_spec(
        configuration(num_moe_experts=None, moe_aux_loss_coeff=0.0)
    ).submodules
    assert class_to_build(moe.mlp) is SkyworkMoELayer
    assert class_to_build(dense.mlp) is MLP
    assert moe.input_layernorm is moe.pre_mlp_layernorm is dense.pre_mlp_layernorm is RMSNorm


@on_ranks(1)
def test_transformer_engine_can_be_left_out_where_it_is_installed() -> None:
    with groups(Layout()), mock.patch("nemo_skymoe.moe.layer.have_transformer_engine", return_value=True):
        spec: Any = get_skywork_block_spec(configuration(), transformer_engine=False)
    assert spec.layer_norm is RMSNorm
    for layer in spec.layer_specs:
        assert layer.submodules.input_layernorm is RMSNorm
        assert layer.submodules.self_attention.submodules.linear_qkv is ColumnParallelLinear


@every(("frequency", "expected"), [(1, "MMMM"), (2, "M-M-"), ([0, 1, 1, 0], "-MM-")])
@on_ranks(2)
def test_block_spec_follows_moe_layer_freq_on_every_stage(frequency: Any, expected: str) -> None:
    layout = Layout(pp=2, vpp=2)
    with groups(layout):
        config = configuration(layout, num_layers=4, moe_layer_freq=frequency)
        for stage in range(2):
            (layer,) = model_chunk(config, stage).decoder.layers
            is_moe = expected[layer.layer_number - 1] == "M"
            assert type(layer.mlp) is (SkyworkMoELayer if is_moe else MLP)
            if is_moe:
                assert type(layer.mlp.router) is SkyworkRouter
                assert layer.mlp.router.layer_number == layer.layer_number


@on_ranks(1)
def test_other_initialisation_is_megatrons() -> None:
    """The router is adopted, not built a second time: no random number is drawn more."""
    with groups():
        states = []
        for layer_class in (MoELayer, SkyworkMoELayer):
            torch.manual_seed(0)
            spec = get_skywork_block_spec(configuration(), moe_layer=layer_class)  # pyright: ignore
            model = GPTModel(configuration(), spec, VOCABULARY, LENGTH, position_embedding_type="rope")
            states.append(
                {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
            )
        stock, ours = states
        assert stock.keys() == ours.keys()
        assert all(torch.equal(stock[name], ours[name]) for name in stock)


@every("dispatcher", ["allgather", "alltoall"])
@on_ranks(2)
def test_the_combine_stays_in_the_models_dtype(dispatcher: str) -> None:
    """bf16 on the wire, although the router's weights are float32."""
    layout = Layout(tp=2, ep=2)
    with groups(layout):
        config = configuration(layout, params_dtype=torch.bfloat16, moe_token_dispatcher_type=dispatcher)
        layer = model_chunk(config).decoder.layers[0].mlp
        x = torch.randn(8, 2, 16, generator=generator("x")).bfloat16().requires_grad_()
        sent: list[torch.dtype] = []

        def watch(function: Any) -> Any:
            def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if tensor.is_floating_point():
                    sent.append(tensor.dtype)
                return function(tensor, *args, **kwargs)

            return watched

        combine = layer.token_dispatcher.token_combine
        hooks = ("_reduce_scatter_along_first_dim", "_gather_along_first_dim")
        with mock.patch.multiple(mappings, **{name: watch(getattr(mappings, name)) for name in hooks}):

            def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                sent.clear()
                combined = combine(tensor, *args, **kwargs)
                assert set(sent) <= {torch.bfloat16}
                assert sent or dispatcher == "alltoall"
                assert combined.dtype == torch.bfloat16
                return combined

            layer.token_dispatcher.token_combine = counted
            output, _ = layer(x)
            output.sum().backward()
        assert output.dtype == x.grad.dtype == torch.bfloat16


class Training:
    """A GPT with attention, Megatron's DDP and optimizer, and a controller attached to them."""

    def __init__(self, layout: Layout, dtype: torch.dtype, **options: Any) -> None:
        half = {torch.bfloat16: {"bf16": True}, torch.float16: {"fp16": True}}.get(dtype, {})
        dtypes = {"params_dtype": dtype, "pipeline_dtype": dtype, **half}
        self.config = config = configuration(
            layout,
            **dtypes,
            moe_adaptive_aux_loss=True,
            moe_expert_capacity_factor=1.25,
            moe_adaptive_aux_loss_smoothing=0.9,
            moe_adaptive_aux_loss_initial=0.005,
            **options,
        )
        torch.manual_seed(0)
        model: Any = GPTModel(
            config, get_skywork_block_spec(config), VOCABULARY, LENGTH, position_embedding_type="rope"
        )
        model = Float16Module(config, model) if half else model
        self.model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
        optimizer = OptimizerConfig(
            optimizer="adam", lr=2e-2, initial_loss_scale=2.0**40, params_dtype=dtype, **half
        )
        self.optimizer = get_megatron_optimizer(optimizer, [self.model])
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self.controller = AuxLossController([self.model])
        self.controller.attach(self.optimizer)

    def step(self) -> tuple[bool, float]:
        """Learn to count; whether the optimizer stepped, and the loss."""
        start = torch.arange(4)[:, None] * 5
        tokens = ((start + torch.arange(LENGTH + 1)) % VOCABULARY).split(2)

        def forward(batches: Any, model: Any) -> Any:
            batch = next(batches)
            positions = torch.arange(LENGTH).expand(len(batch), -1)
            mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1).view(1, 1, LENGTH, LENGTH)
            losses = model(batch[:, :-1], positions, mask, labels=batch[:, 1:])
            return losses, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        outcomes = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(tokens),
            model=[self.model],
            num_microbatches=len(tokens),
            seq_length=LENGTH,
            micro_batch_size=2,
            forward_only=False,
        )
        succeeded, *_ = self.optimizer.step()
        return succeeded, sum(float(outcome["loss"]) for outcome in outcomes) / len(outcomes)


@every("dtype", [torch.float32, torch.bfloat16])
@on_ranks(1)
def test_it_trains_in_plain_megatron(dtype: torch.dtype) -> None:
    with groups():
        training = Training(Layout(), dtype)
        seen = [(*training.step(), training.controller.coefficient_by_layer()[1]) for _ in range(16)]
        losses = [loss for _, loss, _ in seen]
        assert all(succeeded for succeeded, *_ in seen)
        assert losses[-1] < 0.5 * losses[0]
        coefficients = [coefficient for *_, coefficient in seen]
        assert len(set(coefficients)) > 6
        assert set(training.controller.metrics) == {1, 2}


@on_ranks(2)
def test_it_trains_with_tensor_and_expert_parallelism() -> None:
    layout = Layout(tp=2, ep=2)
    with groups(layout):
        training = Training(layout, torch.float32)
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        losses = [training.step()[1] for _ in range(16)]
        assert losses[-1] < 0.5 * losses[0]


@on_ranks(1)
def test_a_step_skipped_for_overflow_leaves_the_coefficients() -> None:
    """fp16 with a loss scale of 2^40: Megatron's optimizer skips until the scale has come down."""
    with groups():
        training = Training(Layout(), torch.float16)
        initial = training.controller.coefficient_by_layer()
        succeeded, _ = training.step()
        assert not succeeded
        assert training.controller.coefficient_by_layer() == initial
        assert training.controller.metrics == {}
        for _ in range(60):
            if training.step()[0]:
                break
        else:
            pytest.fail("the loss scale never came down")
        assert training.controller.coefficient_by_layer() != initial
        assert set(training.controller.metrics) == {1, 2}


@on_ranks(2)
def test_a_rank_without_tokens_takes_part() -> None:
    """Its experts see the other rank's tokens, whose outputs and gradients are those of a rank alone."""
    outcomes = []
    for layout in (Layout(ep=2), Layout()):
        with groups(layout):
            layer = build(configuration(layout, moe_expert_capacity_factor=1.0))[0].decoder.layers[0].mlp
            tokens = 8 if torch.distributed.get_rank() == 0 else 0
            x = torch.randn(tokens, 2, 16, generator=generator("x"), dtype=torch.float64).requires_grad_()
            output, _ = layer(x)
            output.square().sum().backward()
            outcomes.append((output, x.grad, layer.router.weight.grad))
    for apart, alone in zip(*outcomes, strict=True):
        torch.testing.assert_close(apart, alone, rtol=1e-12, atol=1e-12)


@on_ranks(2)
def test_norms_that_are_not_there_without_transformer_engine_are_refused_by_name() -> None:
    with groups(Layout(tp=2, ep=2)):
        split = configuration(Layout(tp=2, ep=2))
        with pytest.raises(ConfigurationError, match="expected get_skywork_block_spec instead of"):
            get_skywork_moe_layer_spec(split)
        get_skywork_moe_layer_spec(configuration())
        (first, _) = (
            get_skywork_block_spec(configuration(Layout(tp=2, ep=2), qk_layernorm=True)).layer_specs or ()
        )
        attention: Any = first.submodules.self_attention.submodules  # pyright: ignore
        assert attention.q_layernorm is attention.k_layernorm is RMSNorm
        for options, option in (
            ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm' with sequence_parallel=True"),
            ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma=True"),
        ):
            with pytest.raises(ConfigurationError, match=option):
                get_skywork_block_spec(configuration(Layout(tp=2, ep=2), **options))
