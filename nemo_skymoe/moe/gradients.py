"""Autograd functions that leave a value alone and decide what its gradient is."""

import torch
from torch import Tensor


class ScaleGradient(torch.autograd.Function):
    """Return the tensor; multiply its gradient by a factor."""

    @staticmethod
    def forward(ctx, tensor: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[0] * ctx.factor, None


class CarryGradient(torch.autograd.Function):
    """Return the first tensor; let losses attached to the second take part in the backward pass."""

    @staticmethod
    def forward(ctx, tensor: Tensor, carried: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[0], torch.zeros_like(gradients[0])
