"""EDP's dispatchers beside Megatron's own on the same ranks: the same results, and the time of a pass."""

import functools
from typing import Any, cast

import torch
from torch import Tensor, distributed

from nemo_skymoe import gpus
from nemo_skymoe.dispatchers import DISPATCHERS, megatron_dispatcher
from nemo_skymoe.moe.layer import SkyworkMoELayer, SkyworkTransformerConfig, get_skywork_block_spec
from nemo_skymoe.selfcheck.finding import Finding, agreement
from nemo_skymoe.selfcheck.host_waits import host_waits
from nemo_skymoe.selfcheck.world import EXPERTS, TOPK, drawn, fill, microseconds, relative, world

BOUND = 1e-10
STOCK = "Megatron's"


def check() -> list[Finding]:
    """Compare every dispatcher in float64, then time it in the precision of a training, without dropping."""
    with world():
        found: list[Finding] = []
        for split in (True, False):
            names = [one.name for one in DISPATCHERS.values() if one.needs_sequence_parallel == split]
            stock = _results(STOCK, split) if split or distributed.get_world_size() == 1 else _of_one_rank()
            for name in names:
                differences = {
                    part: _largest(relative(value, stock[part]))
                    for part, value in _results(name, split).items()
                }
                worst = max(differences, key=lambda part: differences[part])
                what = f"dispatcher {name} in float64 beside {STOCK}, the worst of {worst}"
                found.append(agreement(what, differences[worst], BOUND))
        for fused in _permutations():
            found += [_timed(name, fused) for name in (STOCK, *DISPATCHERS)]
    return found


def _results(name: str, split: bool) -> dict[str, Tensor]:
    """Return output and gradients of a layer: of tokens in full, of weights as this rank holds them."""
    layer = _layer(name, split, hidden=48, ffn=32, dtype=torch.float64)
    return _pass(layer, split)


def _of_one_rank() -> dict[str, Tensor]:
    """Return the results with sequence parallelism, whose gathered tokens are those that all ranks hold without it."""
    return _results(STOCK, split=True)


def _pass(layer: Any, split: bool) -> dict[str, Tensor]:
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    tokens_THB = drawn("tokens", (32 * ranks, 1, layer.config.hidden_size))
    upstream_THB = drawn("upstream", (32 * ranks, 1, layer.config.hidden_size))
    if split:
        tokens_THB, upstream_THB = tokens_THB.chunk(ranks)[rank], upstream_THB.chunk(ranks)[rank]
    tokens_THB = tokens_THB.clone().requires_grad_()
    output, _ = layer(tokens_THB)
    output.backward(upstream_THB)
    router = layer.router.weight.grad
    if split:
        distributed.all_reduce(router)
    return {
        "output": _whole(output.detach(), split),
        "gradient of tokens": _whole(cast(Tensor, tokens_THB.grad), split),
        "gradient of the router": router,
        **{
            f"gradient of {name}": cast(Tensor, parameter.grad)
            for name, parameter in layer.experts.named_parameters()
        },
    }


def _whole(part: Tensor, split: bool) -> Tensor:
    if not split:
        return part
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def _largest(difference: float) -> float:
    """Return the largest difference of all ranks, so that every rank comes to the same verdict."""
    value = torch.tensor(difference, device=gpus.device(), dtype=torch.float64)
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return float(value)


def _layer(
    name: str, split: bool, *, hidden: int, ffn: int, dtype: torch.dtype, fused: bool = False
) -> SkyworkMoELayer:
    ranks = distributed.get_world_size()
    config = SkyworkTransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_load_balancing_type="none",
        moe_adaptive_aux_loss=False,
        moe_router_telemetry=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        tensor_model_parallel_size=ranks,
        expert_model_parallel_size=ranks,
        expert_tensor_parallel_size=1,
        sequence_parallel=split and ranks > 1,
        moe_permute_fusion=fused,
        moe_token_dispatcher_type=megatron_dispatcher(),
        moe_edp=name != STOCK,
        edp_dispatcher="auto" if name == STOCK else name,
    )
    spec: Any = get_skywork_block_spec(config, transformer_engine=False)
    mlp = spec.layer_specs[0].submodules.mlp
    experts = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    layer = SkyworkMoELayer(config, experts, layer_number=1).to(gpus.device())
    first = distributed.get_rank() * (EXPERTS // ranks)

    def everywhere(parameter: str) -> str:
        """Name an expert's parameter by the expert's number in the layer."""
        before, found, after = parameter.partition("local_experts.")
        number, _, rest = after.partition(".")
        return f"{before}{found}{first + int(number)}.{rest}" if found else parameter

    fill(layer, everywhere)
    return layer


def _permutations() -> tuple[bool, ...]:
    """Say with which values of moe_permute_fusion dispatchers are timed."""
    try:
        from megatron.core.extensions import transformer_engine
    except ImportError:
        return (False,)
    return (False, True) if getattr(transformer_engine, "fused_permute", None) is not None else (False,)


def _timed(name: str, fused: bool) -> Finding:
    split = name == STOCK or DISPATCHERS[name].needs_sequence_parallel
    hidden, ffn, tokens, dtype = (
        (4096, 1024, 2048, torch.bfloat16) if gpus.in_use() else (64, 64, 64, torch.float32)
    )
    layer = _layer(name, split, hidden=hidden, ffn=ffn, dtype=dtype, fused=fused)
    ranks = distributed.get_world_size()
    rows = drawn("rows", (tokens if split else tokens * ranks, 1, hidden), dtype).requires_grad_()

    def run() -> None:
        output, _ = layer(rows)
        output.backward(torch.ones_like(output))

    time = _largest(microseconds(run))
    permutation = "fused" if fused else "unfused"
    return Finding(
        "measured",
        f"dispatcher {name if name != STOCK else STOCK + ' ' + megatron_dispatcher()}, {permutation} permutation",
        f"{time:.0f} us a layer and pass there and back, {tokens} tokens a rank of {hidden} in {dtype}, "
        f"{host_waits(run)} host waits",
    )
