"""Attention: the weights are frozen at the image, and what they attend to stays live."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rule import Call, Rule

__all__ = ["MultiHeadAttention", "ScaledDotProductAttention"]


class ScaledDotProductAttention(Rule):
    """softmax(q kᵀ scale + mask) v with the softmax frozen: weights @ v.

    Example:
        >>> from captum_scoremap import freeze
        >>> tokens, attend = torch.rand(1, 4, 2), lambda x: F.scaled_dot_product_attention(x, x, x)
        >>> bool(torch.allclose(freeze(attend, tokens)(2 * tokens), 2 * attend(tokens)))
        True
    """

    kind = "weights"

    def freeze(self, call: Call) -> Tensor:
        """The weights, (..., queries, keys)."""

        def weights(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Tensor:
            if dropout_p:
                raise ValueError(
                    f"scaled_dot_product_attention must have no dropout, got {dropout_p}. Call model.eval()."
                )
            if enable_gqa:
                key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
            if is_causal:
                future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
                scores = scores.masked_fill(future, -torch.inf)
            if attn_mask is not None:
                scores = (
                    scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
                )
            return scores.softmax(-1)

        return weights(*call.args, **call.kwargs)

    def apply(self, call: Call, state: Tensor) -> Tensor:
        """Weights @ v."""

        def value_of(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            return value

        value = value_of(*call.args, **call.kwargs)
        if value.dim() > 2 and value.shape[-3] != state.shape[-3]:
            value = value.repeat_interleave(state.shape[-3] // value.shape[-3], -3)
        return state @ value


class MultiHeadAttention(Rule):
    """``F.multi_head_attention_forward``: projections are linear, the attention weights are frozen.

    Example:
        >>> from captum_scoremap import freeze
        >>> layer = torch.nn.MultiheadAttention(4, 2, bias=False, batch_first=True).eval()
        >>> tokens, attend = torch.rand(1, 3, 4), lambda x: layer(x, x, x)[0]
        >>> bool(torch.allclose(freeze(attend, tokens)(2 * tokens), 2 * attend(tokens), atol=1e-6))
        True
    """

    kind = "weights"

    def freeze(self, call: Call) -> tuple[Tensor, Any]:
        """The weights of each head, (N, heads, queries, keys), and what the call itself returns as weights."""
        given = self._arguments(call)
        if given["training"] and given["dropout_p"]:
            raise ValueError(f"attention must have no dropout, got {given['dropout_p']}. Call model.eval().")
        _, weights = call.function(**{**given, "need_weights": True, "average_attn_weights": False})
        weights = weights.reshape(-1, *weights.shape[-3:])
        if not given["need_weights"]:
            return weights, None
        shown = weights.mean(1) if given["average_attn_weights"] else weights
        return weights, shown if given["query"].dim() == 3 else shown[0]

    def apply(self, call: Call, state: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Out-projection of weights @ value-projection."""
        given = self._arguments(call)
        weights, shown = state
        value: Tensor = given["value"]
        batched = value.dim() == 3
        value = value if batched else value[:, None]
        embedding, heads = int(given["embed_dim_to_check"]), int(given["num_heads"])
        bias = given["in_proj_bias"]
        bias = None if bias is None else bias[2 * embedding :]
        weight = (
            given["v_proj_weight"] if given["use_separate_proj_weight"] else given["in_proj_weight"][2 * embedding :]
        )
        value = F.linear(value, weight, bias)
        if given["static_v"] is not None:
            value = given["static_v"].transpose(0, 1).reshape(-1, value.shape[1], embedding)
        if given["bias_v"] is not None:
            value = torch.cat([value, given["bias_v"].expand(1, value.shape[1], embedding)])
        if given["add_zero_attn"]:
            value = torch.cat([value, value.new_zeros((1, *value.shape[1:]))])
        # (keys, N, embedding) -> (N, heads, keys, embedding of a head)
        split = value.reshape(value.shape[0], -1, heads, embedding // heads).permute(1, 2, 0, 3)
        joined = (weights @ split).permute(2, 0, 1, 3).reshape(weights.shape[-2], -1, embedding)
        output = F.linear(joined, given["out_proj_weight"], given["out_proj_bias"])
        return (output if batched else output[:, 0]), shown

    @staticmethod
    def _arguments(call: Call) -> dict[str, Any]:
        bound = inspect.signature(F.multi_head_attention_forward).bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
