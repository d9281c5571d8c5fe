"""Normalizations: the scale (1/std, 1/norm) is frozen at the image; subtracting the mean is linear already."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rule import Call, EvaluationOnly, Rule

__all__ = [
    "BatchNorm",
    "InstanceNorm",
    "ScaleOnly",
    "Standardize",
    "group_norm_grouping",
    "layer_norm_grouping",
    "local_response_norm",
    "normalize",
    "rms_norm",
]


Grouping = tuple[Sequence[int], int, float, Tensor | None, Tensor | None]


class Standardize(Rule):
    """Subtract the mean, multiply by 1/std, then weight and bias; 1/std is frozen.

    Args:
        grouping: From the operation's arguments: the shape in which the statistics' dimensions are last, how many they
            are, eps, and weight and bias shaped to the input.

    Example:
        >>> from captum_scoremap import freeze
        >>> x, norm = torch.rand(1, 8), lambda x: F.layer_norm(x, (8,))
        >>> bool(torch.allclose(freeze(norm, x)(2 * x), 2 * norm(x), atol=1e-6))
        True
    """

    kind = "scale"

    def __init__(self, grouping: Callable[..., Grouping]) -> None:
        self.grouping = grouping

    def freeze(self, call: Call) -> Tensor:
        """1/std, eps included."""
        shape, count, eps, _, _ = self.grouping(*call.args, **call.kwargs)
        grouped = call.input.reshape(tuple(shape))
        # the kernel of layer_norm has it by the way, many times as fast as a variance
        scale: Tensor = torch.native_layer_norm(grouped, grouped.shape[-count:], None, None, eps)[2]
        return scale.to(grouped.dtype)

    def apply(self, call: Call, state: Tensor) -> Tensor:
        """(x - mean) * frozen scale * weight + bias."""
        x = call.input
        shape, count, _, weight, bias = self.grouping(*call.args, **call.kwargs)
        grouped = x.reshape(tuple(shape))
        output = ((grouped - grouped.mean(tuple(range(-count, 0)), keepdim=True)) * state).reshape(x.shape)
        output = output if weight is None else output * weight
        return output if bias is None else output + bias

    def record(self, call: Call, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        """The operation's own output, which takes one pass, and the scale."""
        with torch.no_grad():
            return run(), self.freeze(call)

    def has_adjoint(self, call: Call) -> bool:
        """Always."""
        return True

    def adjoint(self, call: Call, state: Tensor) -> Callable[[Tensor], Tensor]:
        """Frozen scale * (weight * gradient, its mean subtracted): to subtract the mean is its own adjoint."""
        shape, count, _, weight, _ = self.grouping(*call.args, **call.kwargs)
        whole, dims = call.input.shape, tuple(range(-count, 0))
        weight = None if weight is None else weight.detach()

        def backward(gradient: Tensor) -> Tensor:
            grouped = (gradient if weight is None else gradient * weight).reshape(tuple(shape))
            return ((grouped - grouped.mean(dims, keepdim=True)) * state).reshape(whole)

        return backward


def layer_norm_grouping(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **_: Any,
) -> Grouping:
    """Statistics over the last dimensions."""
    count = len(normalized_shape) if isinstance(normalized_shape, Sequence) else 1
    return input.shape, count, eps, weight, bias


def group_norm_grouping(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **_: Any,
) -> Grouping:
    """Statistics over each group of channels of each image."""
    return (input.shape[0], num_groups, -1), 1, eps, _per_channel(weight, input), _per_channel(bias, input)


def instance_norm_grouping(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **_: Any,
) -> Grouping:
    """Statistics over each channel of each image."""
    return (*input.shape[:2], -1), 1, eps, _per_channel(weight, input), _per_channel(bias, input)


def _per_channel(values: Tensor | None, input: Tensor) -> Tensor | None:
    return None if values is None else values.reshape(-1, *[1] * (input.dim() - 2))


class InstanceNorm(Standardize):
    """Instance norm; affine where it goes by running statistics."""

    def __init__(self) -> None:
        super().__init__(instance_norm_grouping)

    def is_affine(self, call: Call) -> bool:
        """Where it does not use the statistics of the image."""
        given = inspect.signature(instance_norm_grouping).bind(*call.args, **call.kwargs).arguments
        return not given.get("use_input_stats", True)

    def has_adjoint(self, call: Call) -> bool:
        """Where it is not affine."""
        return not self.is_affine(call)


class BatchNorm(EvaluationOnly):
    """Batch norm with its running statistics: affine, (x - mean) / std * weight + bias."""

    def __init__(self) -> None:
        super().__init__(training=5)

    def has_adjoint(self, call: Call) -> bool:
        """Where it is worth the calls: one product, where autograd's own also asks for the statistics' share."""
        return call.is_large

    def adjoint(self, call: Call, state: None) -> Callable[[Tensor], Tensor]:
        """Weight / std * gradient, channel by channel."""

        def scale(
            input: Tensor,
            running_mean: Tensor,
            running_var: Tensor,
            weight: Tensor | None = None,
            bias: Tensor | None = None,
            training: bool = False,
            momentum: float = 0.1,
            eps: float = 1e-5,
            **_: Any,
        ) -> Tensor:
            factor = (running_var + eps).rsqrt_()
            factor = factor if weight is None else factor.mul_(weight.detach())
            return factor.to(input.dtype).reshape(-1, *[1] * (input.dim() - 2))

        factor = scale(*call.args, **call.kwargs)
        return lambda gradient: gradient * factor


class ScaleOnly(Rule):
    """x times a frozen scale, with no mean subtracted.

    Args:
        scale: The scale, from the operation's arguments.

    Example:
        >>> from captum_scoremap import freeze
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> freeze(F.normalize, x)(10 * x)
        tensor([[6., 8.]])
    """

    kind = "scale"

    def __init__(self, scale: Callable[..., Tensor]) -> None:
        self.scale = scale

    def freeze(self, call: Call) -> Tensor:
        """The scale."""
        return self.scale(*call.args, **call.kwargs)

    def apply(self, call: Call, state: Tensor) -> Tensor:
        """Frozen scale * x."""
        return call.input * state

    def has_adjoint(self, call: Call) -> bool:
        """Always."""
        return True

    def adjoint(self, call: Call, state: Tensor) -> Callable[[Tensor], Tensor]:
        """Frozen scale * gradient."""
        return lambda gradient: gradient * state


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """The scale weight / sqrt(mean(x²) + eps)."""
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    scale = torch.rsqrt(input.pow(2).mean(dims, keepdim=True) + eps)
    return scale if weight is None else scale * weight


def normalize(input: Tensor, p: float = 2.0, dim: int | tuple[int, ...] = 1, eps: float = 1e-12, **_: Any) -> Tensor:
    """The scale 1 / max(‖x‖, eps)."""
    norm: Tensor = torch.linalg.vector_norm(input, p, dim, keepdim=True)
    return norm.clamp_min(eps).reciprocal()


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """The scale (k + alpha * mean of squares over neighboring channels)^-beta."""
    squares = F.pad((input * input).flatten(2)[:, None], (0, 0, size // 2, (size - 1) // 2))
    mean = F.avg_pool2d(squares, (size, 1), stride=1).reshape(input.shape)
    return (mean * alpha + k).pow(-beta)
