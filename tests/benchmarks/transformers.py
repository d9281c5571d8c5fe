"""Peers for transformers that their own packages do not offer for timm's: LeGrad, attention rollout, AttnLRP."""

from __future__ import annotations

import copy
import importlib.util
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from captum_scoremap.metrics import Attribution
from tests.benchmarks.subjects import Subject


@contextmanager
def _attention_of(model: nn.Module, blocks: tuple[str, ...]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Attention weights (N, heads, queries, keys) and output tokens of blocks, as the model runs."""
    weights: list[Tensor] = []
    tokens: list[Tensor] = []
    handles = []
    for name in blocks:
        block = model.get_submodule(name)
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda *found: weights.append(found[-1])))
        handles.append(block.register_forward_hook(lambda *found: tokens.append(found[-1])))
    try:
        yield weights, tokens
    finally:
        for handle in handles:
            handle.remove()


def _on_grid(values: Tensor) -> Tensor:
    """Values of the patches, (N, h w), as maps (N, 1, h, w)."""
    side = round(values.shape[1] ** 0.5)
    return values.reshape(len(values), 1, side, side)


def rollout(subject: Subject) -> Attribution:
    """Attention rollout (Abnar and Zuidema 2020): the product of all (attention + identity) / 2; knows no label.

    Read at the class token; where the tokens' mean is what counts, at the mean of the patches.
    """
    model = copy.deepcopy(subject.module)
    read = slice(0, 1) if getattr(model, "global_pool", "avg") == "token" else slice(1, None)

    def attribute(inputs: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad(), _attention_of(model, subject.layers) as (weights, _):
            model(inputs)
        product = torch.eye(weights[0].shape[-1])
        for attention in weights:
            product = (attention.mean(1) + torch.eye(attention.shape[-1])) / 2 @ product
        return _on_grid(product[:, read].mean(1)[:, 1:])

    return attribute


def legrad(subject: Subject) -> Attribution:
    """LeGrad (Bousselham et al. 2024): positive gradients of each block's own score by its attention, averaged.

    The score of a block is the head on its tokens, as though it were the last.
    """
    model = copy.deepcopy(subject.module).requires_grad_()

    def attribute(inputs: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad(), _attention_of(model, subject.layers) as (weights, tokens):
            model(inputs)
            relevance = []
            for attention, found in zip(weights, tokens, strict=True):
                score = model.classify(found).gather(1, target[:, None]).sum()
                (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
                relevance.append(gradient.clamp(min=0).mean((1, 2))[:, 1:])
        return _on_grid(torch.stack(relevance).mean(0))

    return attribute


def _lxt_rules() -> Any:
    """LXT's rules alone: LXT 2.1 as a whole asks for a module that transformers 5 has no more."""
    found = importlib.util.find_spec("lxt")
    if found is None or found.origin is None:
        raise ImportError("AttnLRP needs the package lxt, which is not installed.")
    path = Path(found.origin).parent / "efficient" / "rules.py"
    spec = importlib.util.spec_from_file_location("lxt_rules", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def with_gamma_rule(module: nn.Conv2d | nn.Linear, gamma: float) -> Callable[[Tensor], Tensor]:
    """The forward of a layer whose gradient times input is the relevance of the gamma rule (Montavon et al. 2019).

    Contributions of the sign of the output count (1 + gamma) times. As a function whose value is the plain output z:
    z' (z / z') with the quotient held constant, where z' is the output with these contributions.
    """

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(module, nn.Linear):
            return nn.functional.linear(x, weight, bias)
        return nn.functional.conv2d(x, weight, bias, module.stride, module.padding)

    def favoring(parameter: Tensor | None, sign: int) -> Tensor | None:
        return None if parameter is None else parameter + gamma * sign * (sign * parameter).clamp(min=0)

    def forward(x: Tensor) -> Tensor:
        plain = apply(x, module.weight, module.bias)
        favored = []
        for sign in (1, -1):
            parts = (apply(x.clamp(min=0), favoring(module.weight, sign), favoring(module.bias, sign)),
                     apply(x.clamp(max=0), favoring(module.weight, -sign), None))  # fmt: skip
            favored.append(parts[0] + parts[1])
        chosen = torch.where(plain > 0, *favored)
        return chosen * (plain / torch.where(chosen == 0, 1.0, chosen)).detach()

    return forward


def attention_lrp(subject: Subject) -> Attribution:
    """AttnLRP by LXT's rules, as LXT recommends for vision transformers.

    That is: no gradient through the attention weights, norms and GELU by the identity rule, and the gamma rule in
    convolutions (0.25) and linear layers (0.05). Gradient times input is the relevance.
    """
    rules = _lxt_rules()
    model = copy.deepcopy(subject.module)

    def norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scale = rules.stop_gradient((centered.square().mean(-1, keepdim=True) + self.eps).sqrt())
        result: Tensor = centered / scale * self.weight + self.bias
        return result

    def activation(self: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = rules.identity_rule_implicit(type(self).forward.__get__(self), x)
        return result

    def attention(self: Attention, x: Tensor, **_: Any) -> Tensor:
        queries, keys, values = (
            self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        weights = (rules.stop_gradient(queries) * self.scale @ rules.stop_gradient(keys).transpose(-2, -1)).softmax(-1)
        result: Tensor = self.proj((weights @ values).transpose(1, 2).flatten(2))
        return result

    for module in model.modules():
        for kind, forward in ((nn.LayerNorm, norm), (nn.GELU, activation), (Attention, attention)):
            if isinstance(module, kind):
                module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            gamma = 0.25 if isinstance(module, nn.Conv2d) else 0.05
            module.forward = with_gamma_rule(module, gamma)  # type: ignore[method-assign]

    def attribute(inputs: Tensor, target: Tensor) -> Tensor:
        image = inputs.clone().requires_grad_()
        with torch.enable_grad():
            score = model(image).gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, image)
        return image.detach() * gradient

    return attribute
