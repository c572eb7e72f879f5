"""The cost of the Skywork router beside Megatron's: forward and backward of one router, in one process.

`python -m benchmarks.router` prints the tables of benchmarks/router.md: the kernels that each router starts, counted by
nemo_skymoe/selfcheck/launches.py, and times. Per case the routers take turns, so that whatever else the machine does meets
them alike; compared are the fastest runs.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import megatron.core
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

from nemo_skymoe.moe import router as skywork_router
from nemo_skymoe.moe.controller import AuxLossController
from nemo_skymoe.moe.layer import SkyworkTransformerConfig
from nemo_skymoe.moe.router import SkyworkRouter
from nemo_skymoe.patches import cpu_runtime, router_without_te
from nemo_skymoe.selfcheck.launches import launches

TOKENS, HIDDEN, WARM_UP = 4096, 4608, 3


@dataclass(frozen=True)
class Variant:
    """A router class with its options."""

    name: str
    router: type[TopKRouter]
    options: dict[str, Any]


OFF = {"moe_router_logit_norm_scale": None, "moe_router_telemetry": False, "moe_adaptive_aux_loss": False}
VARIANTS = (
    Variant("stock", TopKRouter, OFF),
    Variant("normalisation", SkyworkRouter, {**OFF, "moe_router_logit_norm_scale": 1.0}),
    Variant("normalisation, telemetry and coefficients", SkyworkRouter, {}),
)


def build(
    variant: Variant, experts: int, topk: int, capacity_factor: float | None, dtype: torch.dtype
) -> Any:
    """A router on the device, every one with the same weights."""
    config = SkyworkTransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=36,
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_expert_capacity_factor=capacity_factor,
        add_bias_linear=False,
        params_dtype=dtype,
        **variant.options,
    )
    if hasattr(moe_utils, "get_default_pg_collection"):
        router: Any = variant.router(config, pg_collection=moe_utils.get_default_pg_collection())
    else:  # Megatron 0.14
        old: Any = moe_utils
        make: Any = variant.router
        router = make(config, model_comm_pgs=old.get_default_model_comm_pgs())
    router.set_layer_number(1)
    generator = torch.Generator().manual_seed(0)
    router.weight.data.copy_(torch.randn(experts, HIDDEN, generator=generator) * 0.02)
    return router.to(device())


def device() -> torch.device:
    """Return the device to measure on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pass_of(router: Any, x: torch.Tensor, with_product: bool) -> Callable[[], None]:
    """One forward and backward pass, and what the controller does once a step; without the product, x are logits."""
    upstream = torch.randn(TOKENS, router.config.num_moe_experts, device=x.device)
    stock: Any = router
    controller = AuxLossController([router]) if isinstance(router, SkyworkRouter) else None
    if not with_product and controller is None:
        stock.gating = lambda logits: logits

    def run() -> None:
        router.weight.grad = x.grad = None
        probs, _ = router(x)
        probs.backward(upstream)
        if controller is not None and controller.adaptive:
            controller.collect()
            controller.commit()

    return run


def seconds(run: Callable[[], None], repeats: int) -> float:
    """Mean duration of `repeats` runs, to the end of what they started on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(experts: int, topk: int, factor: float | None, with_product: bool, arguments: Any) -> list[float]:
    """The fastest run of every variant, in seconds."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, 1, HIDDEN, generator=generator).to(device(), dtype)
    if not with_product:
        x = torch.randn(TOKENS, 1, experts, generator=generator).to(device())
    x.requires_grad_()
    runs = [pass_of(build(v, experts, topk, factor, dtype), x, with_product) for v in VARIANTS]
    best = [float("inf")] * len(runs)
    logits = skywork_router.gate_logits if with_product else lambda router, logits: logits
    with mock.patch.object(skywork_router, "gate_logits", logits):
        for number in range(WARM_UP + arguments.runs):
            for place, run in enumerate(runs):
                duration = seconds(run, arguments.repeats)
                if number >= WARM_UP:
                    best[place] = min(best[place], duration)
    return best


def count(variant: Variant, factor: float | None) -> tuple[int, int, int]:
    """The kernels of a pass with the gate's product in bf16: forward, backward, and once a step for telemetry."""
    router = build(variant, 16, 2, factor, torch.bfloat16)
    x = torch.randn(256, 1, HIDDEN, device=device()).bfloat16().requires_grad_()
    controller = AuxLossController([router]) if isinstance(router, SkyworkRouter) else None
    found = (0, 0, 0)
    for _ in range(2):  # constants are made in the first pass
        forward, (probs, _) = launches(lambda: router(x))
        gradient = torch.ones_like(probs)
        backward, _ = launches(lambda probs=probs, gradient=gradient: probs.backward(gradient))
        once = launches(controller.collect)[0] if controller is not None and controller.adaptive else 0
        found = (forward, backward, once)
    return found


def print_counts() -> None:
    """Print the table of kernels."""
    print("| kernels, bf16 | capacity | forward | backward | once a step |\n|---|---|---|---|---|")
    for factor in (None, 1.25):
        for variant in VARIANTS:
            forward, backward, once = count(variant, factor)
            print(f"| {variant.name} | {factor or 'dropless'} | {forward} | {backward} | {once} |")
    print(flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", action="store_true", help="print the counts of kernels alone")
    parser.add_argument("--runs", type=int, default=40, help="interleaved runs of every router")
    parser.add_argument("--repeats", type=int, default=1, help="passes a run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cpu_runtime.apply()
    router_without_te.apply()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed: Any = torch.distributed
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread, float32"
    print(
        f"torch {torch.__version__}, megatron-core {megatron.core.__version__}, {where}, {arguments.runs} runs\n"
    )
    print_counts()
    if arguments.counts:
        return
    print(
        "| experts, top-k | capacity | gate's product | stock | "
        + " | ".join(v.name for v in VARIANTS[1:])
        + " |"
    )
    print("|---|---|---|---|---|---|")
    for experts, topk in ((16, 2), (64, 6)):
        for factor in (None, 1.25):
            for with_product in (True, False):
                stock, *others = measure(experts, topk, factor, with_product, arguments)
                cells = " | ".join(f"{1e3 * other:.2f} ms, {other / stock:.3f}x" for other in others)
                included = "with" if with_product else "without"
                print(
                    f"| {experts}, {topk} | {factor or 'dropless'} | {included} | {1e3 * stock:.2f} ms | {cells} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
