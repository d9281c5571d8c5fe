"""Where B is: the share of every operation's constant part, at its place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from captum_scoremap.checks import check_callable, check_images, check_layer
from captum_scoremap.rules import Rule
from captum_scoremap.scores import Target
from captum_scoremap.tape import Site

from .ledger import explain_completely
from .subject import Subject

__all__ = ["BiasMaps", "bias_maps"]


@dataclass(frozen=True)
class BiasMaps:
    """B of Eq. (3), place by place.

    Attributes:
        maps: Name of the operation to the map of its constant part, (N, 1, h, w), in logits, on its own grid.
        placeless: Name to what has no place in the image, (N,), in logits: head biases, class tokens.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> found = bias_maps(model, torch.rand(1, 3, 6, 6), target=7)
        >>> {name: tuple(one.shape) for name, one in found.maps.items()}, list(found.placeless)
        ({'0': (1, 1, 4, 4)}, ['3'])
    """

    maps: Mapping[str, Tensor]
    placeless: Mapping[str, Tensor]


def bias_maps(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    target: Target = None,
    layer: nn.Module | None = None,
    additional_forward_args: object = None,
    *,
    rules: Mapping[Any, Rule] | None = None,
) -> BiasMaps:
    """Return where B is: the map of every constant above a layer.

    beta_k(p) = sum over channels of A_k(c, p) o_k(c, p), with o_k the constant part of operation k; the sum of all maps
    and of what is placeless is B. What bypasses the layer on a parallel branch is B, too, named ``beside`` the
    operation where it joins. The errors are those of :func:`linear_form`, and a ValueError if the input is not one
    tensor of images.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        inputs: The image, (N, C, H, W).
        target: Label of each image in any of Captum's forms, or a function from the model's output to (N,).
        layer: The layer; None for the image itself.
        additional_forward_args: Additional arguments; they are constants.
        rules: Operation to rule, to replace or add some.

    Returns:
        The maps.

    Example:
        >>> import torch
        >>> from captum_scoremap import linear_form
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> image = torch.rand(1, 3, 6, 6)
        >>> found = bias_maps(model, image, 7, model[1])
        >>> total = sum(one.sum() for one in (*found.maps.values(), *found.placeless.values()))
        >>> bool(torch.allclose(total, linear_form(model, image, 7, model[1]).bias))
        True
    """
    check_callable(forward_func)
    if layer is not None:
        check_layer(forward_func, layer)
    site: Site | None = None if layer is None else (layer, False)
    subject = Subject(forward_func, (check_images(inputs),), additional_forward_args, rules)
    (ledger,), _ = explain_completely(subject, target, [site])
    # the layer's own sub-scores, of its class token too, are no part of B
    above = ({name: one for name, one in book.items() if name} for book in (ledger.maps, ledger.placeless))
    return BiasMaps(*above)
