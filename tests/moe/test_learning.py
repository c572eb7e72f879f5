"""Every router that is accepted learns, by the gradient of the formula; the refused ones have none there."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from nemo_skymoe.config import ConfigurationError
from tests.moe.worlds import configuration, generator, groups, make_router, on_ranks

SEQUENCE, BATCH, HIDDEN = 24, 2, 16


def every_router() -> Iterator[dict[str, Any]]:
    """All small numbers of experts, with every way from logits to weights."""
    for experts in (1, 2, 3, 4):
        for topk, scale, correction, pre_softmax, two_layers in product(
            range(1, experts + 1), (None, 0.01, 1.0, 10.0), (0, 1), (False, True), (False, True)
        ):
            yield {
                "num_moe_experts": experts,
                "moe_router_topk": topk,
                "moe_router_logit_norm_scale": scale,
                "moe_router_logit_norm_correction": correction,
                "moe_router_pre_softmax": pre_softmax,
                "moe_router_two_layer_gate": two_layers,
            }


def formula(x: Tensor, weights: list[Tensor], chosen: Tensor, options: dict[str, Any]) -> Tensor:
    """Weights [tokens, experts] by eq. (1), (2) and (6), in the words of the report."""
    z = x.reshape(-1, HIDDEN)
    if options["moe_router_two_layer_gate"]:
        z = torch.tanh(z @ weights[1].t())
    z = z @ weights[0].t()
    scale = options["moe_router_logit_norm_scale"]
    if scale is not None:
        deviation = z.std(-1, keepdim=True, correction=options["moe_router_logit_norm_correction"])
        z = scale * (z - z.mean(-1, keepdim=True)) / deviation
    if options["moe_router_pre_softmax"]:
        return z.softmax(-1).masked_fill(~chosen, 0.0)
    return z.masked_fill(~chosen, -torch.inf).softmax(-1)


@on_ranks(1)
def test_every_accepted_router_has_the_formulas_gradient_and_every_refused_one_none() -> None:
    accepted = refused = 0
    with groups():
        for options in every_router():
            x = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator("x"), dtype=torch.float64)
            loss_of = torch.randn(
                SEQUENCE * BATCH, options["num_moe_experts"], generator=generator("loss"), dtype=torch.float64
            )
            try:
                config = configuration(
                    **options, moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0
                )
            except ConfigurationError:
                refused += 1
                expected = refused_gradient(x, loss_of, options)
                assert expected <= 1e-12, options
                continue
            accepted += 1
            router = make_router(config)
            probs, chosen = router(x)
            weights = (
                [router.weight, router.hidden_weight] if config.moe_router_two_layer_gate else [router.weight]
            )
            found = torch.autograd.grad((probs * loss_of).sum(), weights)
            expected = torch.autograd.grad((formula(x, weights, chosen, options) * loss_of).sum(), weights)
            for one, other in zip(found, expected, strict=True):
                # Megatron takes the softmax in float32 whatever the model is in.
                assert other.norm() > 1e-3 and (one - other).norm() <= 1e-6 * other.norm(), options
    # Of 32 for every number of experts a token: none of one expert; without normalisation of two; top-1 before softmax.
    assert (accepted, refused) == (4 + 8 + (16 + 32 + 32) + (16 + 32 + 32 + 32), 32 + 28 + 24 + 16 + 16)


def refused_gradient(x: Tensor, loss_of: Tensor, options: dict[str, Any]) -> float:
    """The largest gradient of the gate's matrices where no router is built; a standard deviation of one number is 0."""
    experts = options["num_moe_experts"]
    if experts == 1:
        return 0.0
    gate = torch.randn(experts, HIDDEN, generator=generator("gate"), dtype=torch.float64)
    weights = [gate.requires_grad_()]
    if options["moe_router_two_layer_gate"]:
        hidden = torch.randn(8 * experts, HIDDEN, generator=generator("hidden"), dtype=torch.float64)
        second = torch.randn(experts, 8 * experts, generator=generator("second"), dtype=torch.float64)
        weights = [second.requires_grad_(), hidden.requires_grad_()]
    with torch.no_grad():
        free = {**options, "moe_router_pre_softmax": True, "moe_router_logit_norm_scale": None}
        everything = torch.ones(len(loss_of), experts, dtype=torch.bool)
        order = formula(x, weights, everything, free).topk(options["moe_router_topk"], dim=-1).indices
        chosen = torch.zeros_like(everything).scatter(1, order, True)
    gradients = torch.autograd.grad((formula(x, weights, chosen, options) * loss_of).sum(), weights)
    return max(float(gradient.norm()) for gradient in gradients)
