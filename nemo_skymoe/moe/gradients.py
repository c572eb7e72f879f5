"""Autograd functions that return a value unchanged and decide its gradient."""

import torch
from torch import Tensor


class ScaleGradient(torch.autograd.Function):
    """Returns the tensor unchanged, and multiplies its gradient by a factor."""

    @staticmethod
    def forward(ctx, tensor: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[0] * ctx.factor, None


class CarryGradient(torch.autograd.Function):
    """Returns the first tensor unchanged, and runs the backward pass of losses that are attached to the second."""

    @staticmethod
    def forward(ctx, tensor: Tensor, carried: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[0], torch.zeros_like(gradients[0])
