"""Normalizations: the scale (1/std) is frozen at the image; subtracting the mean is linear already.

Norms that PyTorch makes of smaller operations (RMS norm, ``F.normalize``, local response norm) need no rule here: their
scale is a gate, or the denominator of a quotient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .call import Call, Value
from .rule import Composite, Gradients, Rule

__all__ = ["BatchNorm", "GroupNorm", "LayerNorm"]

aten = torch.ops.aten

_EPS = ("eps", "epsilon")


class Standardize(Rule):
    """Subtract the mean, multiply by 1/std, then weight and bias; 1/std is frozen.

    A subclass says what the statistics are taken over. A weight that is live, as in an adaptive norm, is a factor of a
    product.

    Attributes:
        weight: Position of the weight among the arguments, which the bias comes after.
    """

    kind = "scale"
    live_outputs = 1
    weight = 1

    def variant(self, call: Call) -> Rule:
        """Return the norm without weight and bias, and these after it, where one of them is live."""
        if call.is_first_alone_live() or not any(map(call.is_live, call.args[self.weight : self.weight + 2])):
            return self
        operation = call.operation

        def expanded(*args: Any) -> tuple[Tensor, ...]:
            weight, bias = self.affine(Call(operation, args, {}, (), ()))
            bare = *args[: self.weight], None, None, *args[self.weight + 2 :]
            output, *statistics = self.without_weight(operation)(*bare)
            return _all_outputs(operation, _weighted(output, weight, bias), *statistics)

        return Composite(expanded)

    def without_weight(self, operation: Any) -> Any:
        """Return the operation that standardizes as this one does, and may have no weight."""
        return operation

    def grouped(self, call: Call, x: Tensor) -> Tensor:
        """Return the argument in the shape in which each of its rows, the last dimension, has statistics of its own."""
        raise NotImplementedError

    def affine(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias, shaped to the argument: one number for each channel."""
        return _per_channel(call.args[1], call.input), _per_channel(call.args[2], call.input)

    def freeze(self, call: Call) -> Tensor | None:
        """Return 1/std, eps included, which the kernel returns as a by-product: (rows, 1)."""
        scale: Tensor = call.output[2]
        if torch.is_grad_enabled():  # autograd takes by-products for constants
            x = self.grouped(call, call.input).to(scale.dtype)
            scale = (x.var(-1, correction=0) + call.argument(*_EPS)).rsqrt()
        return scale.to(call.input.dtype).reshape(-1, 1)

    def apply(self, call: Call, state: Tensor) -> tuple[Tensor, ...]:
        """Return (x - mean) * frozen scale * weight + bias, and the statistics as constants."""
        x = call.input
        grouped = self.grouped(call, x)
        weight, bias = self.affine(call)
        output = ((grouped - grouped.mean(-1, keepdim=True)) * state).reshape(x.shape)
        # weights may be of a wider type, as under autocast
        return (_weighted(output, weight, bias).to(x.dtype),)

    def transpose(self, call: Call, state: Tensor, gradients: Gradients) -> list[Tensor | None]:
        """Return frozen scale * (weight * coefficients, their mean subtracted)."""
        weight, _ = self.affine(call)
        grouped = self.grouped(call, gradients[0] if weight is None else gradients[0] * weight)
        shape, dtype = call.values[0].shape, call.values[0].dtype
        return [((grouped - grouped.mean(-1, keepdim=True)) * state).reshape(shape).to(dtype)]

    def constants(self, call: Call, state: Tensor) -> Sequence[Tensor | None]:
        """Return the bias."""
        return (self.affine(call)[1],)


class LayerNorm(Standardize):
    """``native_layer_norm(input, normalized_shape, weight, bias, eps)``: statistics over the last dimensions.

    Equation:
        y = w · r̄ · (x − mean(x)) + b, with r̄ = 1 / √(var(x̄) + ε), over the last dimensions

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.nn.LayerNorm(2), torch.tensor([[1.0, 3.0]]))  # standard deviation 1
        >>> frozen(torch.tensor([[0.0, 8.0]])).detach().round()
        tensor([[-4.,  4.]])
    """

    weight = 2

    def grouped(self, call: Call, x: Tensor) -> Tensor:
        """Return one row for each position."""
        return x.reshape(-1, int(torch.Size(call.args[1]).numel()))

    def affine(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Return them shaped to the last dimensions as they are."""
        return call.args[2], call.args[3]


class GroupNorm(Standardize):
    """``native_group_norm(input, weight, bias, N, C, HxW, group, eps)``: statistics over each group of channels.

    Equation:
        y = w · r̄ · (x − mean(x)) + b, with r̄ = 1 / √(var(x̄) + ε), over each group of channels

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.nn.GroupNorm(1, 2), torch.tensor([[1.0, 3.0]]))  # standard deviation 1
        >>> frozen(torch.tensor([[0.0, 8.0]])).detach().round()
        tensor([[-4.,  4.]])
    """

    def grouped(self, call: Call, x: Tensor) -> Tensor:
        """Return one row for each image and group."""
        images, channels, places, groups = call.args[3:7]
        return x.reshape(images * groups, channels // groups * places)


class BatchNorm(Standardize):
    """``native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)`` and its like.

    With running statistics it is affine, channel by channel, and the transpose is one product. PyTorch's own backward
    pass is not used: on a CPU it is wrong for a contiguous argument and coefficients in channels-last order.

    Without, statistics go over the batch, which is how PyTorch computes an instance norm: a batch of one image whose
    channels are those of all images.

    Equation:
        y = w · r · (x − μ) + b, with r = 1 / √(σ² + ε) and the running μ, σ²: nothing is frozen
        y = w · r̄ · (x − mean(x)) + b, with r̄ = 1 / √(var(x̄) + ε), where there are no running statistics

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.nn.BatchNorm1d(2).eval(), torch.tensor([[1.0, 3.0]]))
        >>> frozen(torch.tensor([[0.0, 8.0]])).detach().round()
        tensor([[0., 8.]])
    """

    def variant(self, call: Call) -> Rule:
        """Return the formula, too, where running statistics are live; they must not be updated."""
        if call.is_first_alone_live() or not any(map(call.is_live, call.args[3:5])):
            return super().variant(call)
        if not self.is_affine(call):
            raise ValueError(
                "running statistics that a norm updates must be constants, got some that depend on the image. Call "
                "model.eval(), or pass none."
            )

        def expanded(*args: Any) -> tuple[Tensor, ...]:
            x, (mean, variance) = args[0], args[3:5]
            weight, bias = self.affine(Call(call.operation, args, {}, (), ()))
            output = (x - _shaped(mean, x)) * _shaped((variance + call.argument(*_EPS)).rsqrt(), x)
            return _all_outputs(call.operation, _weighted(output, weight, bias))

        return Composite(expanded)

    def without_weight(self, operation: Any) -> Any:
        """Return PyTorch's own kernel for those of vendors, which want a weight."""
        is_of_vendor = operation in {aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}
        return aten.native_batch_norm.default if is_of_vendor else operation

    def is_affine(self, call: Call) -> bool:
        """Return whether it uses running statistics."""
        return not call.argument("training")

    def freeze(self, call: Call) -> Tensor | None:
        """Return 1/std where it is that of the image, which must be the only one."""
        if self.is_affine(call):
            return None
        if call.input.shape[0] > 1:
            raise ValueError(
                "batch_norm must use running statistics: with those of the batch a score is not a function of one "
                f"image; got a batch of {call.input.shape[0]}. Call model.eval(); where the norm tracks no running "
                "statistics, explain one image at a time."
            )
        return super().freeze(call)

    def apply(self, call: Call, state: Tensor | None) -> tuple[Tensor, ...]:
        """Return the norm with its scale frozen."""
        if state is not None:
            return super().apply(call, state)
        if not torch.is_grad_enabled():  # the kernel, for the same rounding
            return tuple(call.run()[:1])
        x = call.input
        scale = self._scale(call)
        mean, bias = (_per_channel(call.args[position], x) for position in (3, 2))
        return (_weighted(x - mean, scale, bias).to(x.dtype),)

    def transpose(self, call: Call, state: Tensor | None, gradients: Gradients) -> list[Tensor | None]:
        """Return scale * coefficients."""
        if state is not None:
            return super().transpose(call, state, gradients)
        return [gradients[0] * self._scale(call)]

    def constants(self, call: Call, state: Tensor | None) -> Sequence[Tensor | None]:
        """Return the bias, less the scaled running mean."""
        bias = self.affine(call)[1]
        if state is not None:
            return (bias,)
        mean = _shaped(call.args[3], call.input) * self._scale(call)
        return (-mean if bias is None else bias - mean,)

    def grouped(self, call: Call, x: Tensor) -> Tensor:
        """Return one row for each channel of the one image."""
        return x.reshape(x.shape[1] if x.dim() > 1 else 1, -1)

    def _scale(self, call: Call) -> Tensor:
        """Return weight / std, shaped to the argument."""
        weight, variance = call.args[1], call.args[4]
        scale = (variance + call.argument(*_EPS)).rsqrt()
        scale = scale if weight is None else scale * weight
        return _shaped(scale.to(call.input.dtype), call.input)


def _all_outputs(operation: Any, output: Tensor, *statistics: Tensor) -> tuple[Tensor, ...]:
    """Return as many outputs as the operation has; empty ones for by-products that only its backward pass reads."""
    missing = len(operation._schema.returns) - 1 - len(statistics)
    return (output, *statistics, *(output.new_empty(0) for _ in range(missing)))


def _weighted(output: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def _per_channel(values: Tensor | None, input: Tensor | Value) -> Tensor | None:
    return None if values is None else _shaped(values, input)


def _shaped(values: Tensor, input: Tensor | Value) -> Tensor:
    return values.reshape(-1, *[1] * (input.ndim - 2))
