"""Attention kernels: the weights are frozen at the image, and what they attend to stays live.

Attention that a model writes out needs no rule here: its softmax is a gate.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .call import Call
from .rule import Gradients, Rule

__all__ = ["Attention"]

_MASKS = ("attn_mask", "attn_bias")


class Attention(Rule):
    """softmax(q kᵀ scale + mask) v with the softmax frozen: weights @ v.

    Equation:
        y = W̄ v, with W̄ = softmax(q̄ k̄ᵀ · scale + mask)

    Example:
        >>> from captum_scoremap import freeze
        >>> tokens, attend = torch.rand(1, 4, 2), lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> bool(torch.allclose(freeze(attend, tokens)(2 * tokens), 2 * attend(tokens)))
        True
    """

    kind = "weights"
    live_outputs = 1

    def freeze(self, call: Call) -> Tensor:
        """Return the weights, (..., queries, keys)."""
        return self._weights(call, self._scores(call))

    def _weights(self, call: Call, scores: Tensor) -> Tensor:
        """Return the softmax; where all keys are masked, zero, as the kernels have it."""
        weights = scores.softmax(-1)
        if call.argument(*_MASKS) is None:
            return weights
        return weights.masked_fill(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)

    def written_out(self, operation: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return what the kernel computes, by operations that can be derived twice: the output and log-sum-exp."""

        def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            call = Call(operation, args, kwargs, (), ())
            scores = self._scores(call)
            weights = self._weights(call, scores)
            return weights @ self._repeated(args[2], weights), scores.logsumexp(-1)

        return attend

    def _scores(self, call: Call) -> Tensor:
        """Return what the softmax is taken of, (..., queries, keys)."""
        query, key = call.args[0], self._repeated(call.args[1], call.args[0])
        dropout, scale = call.argument("dropout_p"), call.argument("scale")
        if dropout:
            raise ValueError(f"scaled_dot_product_attention must have no dropout, got {dropout}. Call model.eval().")
        scores: Tensor = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if call.argument("is_causal"):
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        mask = call.argument(*_MASKS)
        if mask is not None and mask.dtype is torch.float32 and query.dtype is torch.float64:
            raise ValueError(  # what lies in memory there is taken for numbers of twice the size
                "scaled_dot_product_attention must have an attn_mask of the queries' type, got torch.float32 beside "
                "torch.float64, where PyTorch's kernel returns wrong numbers. Explain model.float(), or make the mask "
                "with dtype=query.dtype."
            )
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores

    def apply(self, call: Call, state: Tensor) -> tuple[Tensor, ...]:
        """Return weights @ v."""
        return (state @ self._repeated(call.args[2], state),)

    def transpose(self, call: Call, state: Tensor, gradients: Gradients) -> list[Tensor | None]:
        """Return weightsᵀ @ coefficients for the values attended to, nothing for queries and keys."""
        gradient, value = gradients[0], call.args[2]
        found: list[Tensor | None] = [None] * len(call.values)
        if not call.is_live(value):
            return found
        share = state.transpose(-2, -1) @ gradient
        heads = value.shape[-3]
        if share.shape[-3] != heads:
            share = share.unflatten(-3, (heads, -1)).sum(-3)
        place = sum(call.is_live(argument) for argument in call.args[:2])
        found[place] = share
        return found

    def constants(self, call: Call, state: Tensor) -> Sequence[Tensor | None]:
        """Return none where what is attended to is live."""
        return () if call.is_live(call.args[2]) else super().constants(call, state)

    @staticmethod
    def _repeated(one: Tensor, other: Tensor) -> Tensor:
        """Return keys or values for as many heads as another tensor has, of which several may share one."""
        if one.shape[-3] == other.shape[-3]:
            return one
        return one.repeat_interleave(other.shape[-3] // one.shape[-3], -3)
