"""The gate's variants: bias and the authors' two-layer tanh gate."""

from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

from nemo_skymoe.moe.router import SkyworkRouter
from tests.cases import every
from tests.moe.worlds import (
    Layout,
    build,
    configuration,
    fresh_router,
    generator,
    groups,
    make_router,
    on_ranks,
)

HIDDEN, EXPERTS = 16, 8
TWO_LAYERS = {"moe_router_two_layer_gate": True, "moe_router_gate_bias": True}


def hidden_states() -> torch.Tensor:
    return torch.randn(5, 3, HIDDEN, generator=generator("hidden"), dtype=torch.float64)


@every("bias", [False, True])
@every("layers", [1, 2])
@on_ranks(1)
def test_formula(layers: int, bias: bool) -> None:
    """z = W x + b, or W2 tanh(W1 x) + b; all parameters get autograd's gradient."""
    with groups():
        config = configuration(
            moe_router_two_layer_gate=layers == 2,
            moe_router_gate_bias=bias,
            moe_router_logit_norm_scale=None,
        )
        router = make_router(config)
        x = hidden_states().requires_grad_()
        parameters = dict(router.named_parameters())
        hidden = x if layers == 1 else torch.tanh(x @ parameters["hidden_weight"].t())
        expected = hidden @ parameters["weight"].t() + (parameters["bias"] if bias else 0)
        found = router.gating(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        upstream = torch.randn(found.shape, generator=generator("upstream"), dtype=torch.float64)
        inputs = [x, *parameters.values()]
        for a, b in zip(
            torch.autograd.grad(found, inputs, upstream),
            torch.autograd.grad(expected, inputs, upstream),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every("dtype", [torch.float32, torch.bfloat16])
@on_ranks(1)
def test_parameters(dtype: torch.dtype) -> None:
    with groups():
        config = configuration(
            params_dtype=dtype,
            moe_router_two_layer_gate=True,
            moe_router_gate_bias=True,
            sequence_parallel=False,
        )
        router = make_router(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in router.named_parameters()}
        assert shapes == {"weight": (8, 64), "hidden_weight": (64, 16), "bias": (8,)}
        assert all(parameter.dtype == dtype for parameter in router.parameters())
        assert router(hidden_states().to(dtype))[0].dtype == torch.float32


@on_ranks(1)
def test_initialisation() -> None:
    """Both layers by the configuration's method; the bias is zero; the linear gate's weight stays Megatron's."""
    with groups():
        router = fresh_router(
            configuration(**TWO_LAYERS, params_dtype=torch.float32, init_method_std=0.5, hidden_size=64)
        )
        for weight in (router.weight, router.hidden_weight):
            assert weight.std().item() == pytest.approx(0.5, rel=0.15)
        assert not router.bias.any()
        weights = []
        for router_class in (SkyworkRouter, TopKRouter):
            torch.manual_seed(0)
            weights.append(fresh_router(configuration(), router_class).weight)
        assert torch.equal(*weights)


@on_ranks(1)
def test_checkpoints_hold_the_gate() -> None:
    """Under the router's name, whole, as one layer of the stack; no persistent buffer beside the parameters."""
    with groups():
        chunk = build(configuration(**TWO_LAYERS))[0]
        state = {
            entry.key: entry.global_shape
            for entry in chunk.sharded_state_dict().values()
            if isinstance(entry, ShardedTensor) and ".router." in entry.key
        }
        prefix = "decoder.layers.mlp.router."
        assert state == {
            prefix + "weight": (2, 8, 64),
            prefix + "hidden_weight": (2, 64, 16),
            prefix + "bias": (2, 8),
        }


@on_ranks(2)
def test_sequence_parallelism_sums_its_gradients() -> None:
    layout = Layout(tp=2, ep=2)
    with groups(layout):
        chunk = build(configuration(layout, **TWO_LAYERS))[0]
        tags = {
            name: parameter.sequence_parallel  # pyright: ignore
            for name, parameter in chunk.named_parameters()
            if ".router." in name
        }
        assert len(tags) == 2 * 3 and all(tags.values())


def product_of_equal_types(
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    layout: str,
    bias: Any = None,
    grad: bool = False,
) -> tuple[torch.Tensor]:
    """What Megatron asks of Transformer Engine's `general_gemm`, which refuses bf16 times float32."""
    assert a.dtype == b.dtype, f"{a.dtype} times {b.dtype}"
    a, b = a.to(out_dtype), b.to(out_dtype)
    product = {"TN": lambda: b @ a.t(), "NN": lambda: b @ a, "NT": lambda: b.t() @ a}[layout]()
    return (product if bias is None else product + bias.to(out_dtype),)


@every("bias", [False, True])
@every("layers", [1, 2])
@every("dtype", [torch.bfloat16, torch.float32])
@on_ranks(1)
def test_transformer_engine_multiplies_equal_types(dtype: torch.dtype, layers: int, bias: bool) -> None:
    """The tanh of the two-layer gate is in float32, whatever the weights are."""
    with groups():
        options = {"moe_router_two_layer_gate": layers == 2, "moe_router_gate_bias": bias}
        router = make_router(configuration(params_dtype=dtype, **options))
        found = []
        for gemm in (None, product_of_equal_types):
            with mock.patch.object(moe_utils, "te_general_gemm", gemm, create=True):
                x = hidden_states().to(dtype).requires_grad_()
                logits = router.gating(x)
                gradients = torch.autograd.grad(logits.square().sum(), [x, *router.parameters()])
                found.append([logits, *gradients])
        for plain, engine in zip(*found, strict=True):
            assert plain.dtype == engine.dtype
            torch.testing.assert_close(plain, engine)


class OnGpu(torch.Tensor):
    """A tensor that only says that it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))  # pyright: ignore


@every("options", [{}, TWO_LAYERS])
@on_ranks(1)
def test_a_gate_on_the_cpu_follows_its_input_to_the_device(options: dict[str, Any]) -> None:
    """Megatron makes a router's weights on the CPU, and moves them in the first forward pass."""
    to, moved = torch.Tensor.to, []

    def record(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args != (torch.device("cuda", 0),):
            return to(tensor, *args, **kwargs)
        moved.append(tensor.data_ptr())
        return tensor

    with groups():
        router = make_router(configuration(**options))
        places = [parameter.data_ptr() for parameter in router.parameters()]
        with mock.patch.object(torch.Tensor, "to", record):
            expected = router.gating(hidden_states())
            assert moved == []
            found = router.gating(hidden_states().as_subclass(OnGpu))
        assert moved == places
        assert torch.equal(found.as_subclass(torch.Tensor), expected)


@every("norm_scale", [None, 1.0])
@every(("router_dtype", "result"), [(None, "float32"), ("fp32", "float32"), ("fp64", "float64")])
@every("dtype", [torch.bfloat16, torch.float32])
@on_ranks(1)
def test_moe_router_dtype(
    dtype: torch.dtype, router_dtype: str | None, result: str, norm_scale: float | None
) -> None:
    """The gate is in float32 by default, where Megatron's is in the model's type; else both do what they are told."""
    with groups():
        options = {"params_dtype": dtype, "moe_router_logit_norm_scale": norm_scale}
        router = make_router(configuration(moe_router_dtype=router_dtype, **options))
        x = hidden_states().to(dtype).requires_grad_()
        logits, (weights, _) = router.gating(x), router(x)
        assert str(logits.dtype) == str(weights.dtype) == f"torch.{result}"
        gradients = torch.autograd.grad(weights.square().sum(), [x, router.weight])
        assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)
        if norm_scale is None:
            stock = make_router(configuration(moe_router_dtype=router_dtype or "fp32", **options), TopKRouter)
            assert torch.equal(logits, stock.gating(x)) and torch.equal(weights, stock(x)[0])
