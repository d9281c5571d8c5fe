"""NeuronScoreMap: the map of one neuron on the input or on any lower layer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from captum.attr import NeuronAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_scoremap.checks import (
    InvalidTypeError,
    InvalidValueError,
    check_grad_kwargs,
    check_inputs,
    check_layer,
    is_tuple_of_one,
)
from captum_scoremap.layout import channels_at
from captum_scoremap.linear import Reduction, explain
from captum_scoremap.rules import Rule, tensors_in
from captum_scoremap.tape import Site

from .contract import Contract

__all__ = ["NeuronScoreMap"]

Selector = int | np.integer[Any] | tuple[int | np.integer[Any] | slice, ...] | Callable[[Any], Tensor]


class NeuronScoreMap(NeuronAttribution, Contract):
    """Sub-scores of a neuron: its activation as A·Y + B with the input, or with the output Y of any lower layer.

    "The output of a neuron is a linear combination of the outputs of any lower layer" (Yu et al. 2015, Section 2).

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        layer: The neuron's layer. Nothing above it is run.
        device_ids: Accepted for compatibility with Captum: a ``DataParallel`` model is explained on the device of its
            module.
        multiply_by_inputs: Whether to return the sub-scores A·Y, or the coefficients A.
        rules: Operation to rule, to replace or add some.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> method = NeuronScoreMap(model, model[1])
        >>> sub_scores, delta = method.attribute(torch.rand(2, 3, 6, 6), (0, 2, 2), return_convergence_delta=True)
        >>> sub_scores.shape, bool(delta.abs().max() < 1e-6)
        (torch.Size([2, 3, 6, 6]), True)
        >>> method = NeuronScoreMap(model, model[3])
        >>> method.attribute(torch.rand(2, 3, 6, 6), 7, to_layer=model[1], attr_dim_summation=True).shape
        torch.Size([2, 1, 4, 4])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
        *,
        rules: Mapping[Any, Rule] | None = None,
    ) -> None:
        NeuronAttribution.__init__(self, forward_func, layer, device_ids)
        Contract.__init__(self, forward_func, rules, multiply_by_inputs)
        check_layer(forward_func, layer)

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        neuron_selector: Selector,
        additional_forward_args: object = None,
        attribute_to_neuron_input: bool = False,
        to_layer: nn.Module | None = None,
        attr_dim_summation: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
        return_convergence_delta: bool = False,
        channel_dim: int | None = None,
    ) -> Any:
        """Return the sub-scores (or coefficients) of a neuron.

        Args:
            inputs: The image, (N, C, H, W), or a tuple of such inputs.
            neuron_selector: Index of the neuron in the layer's output without its batch dimension: an int, a tuple of
                ints and slices (whose neurons are summed), or a function from the layer's output to (N,), or to their
                sum over the batch, as ``torch.sum`` is.
            additional_forward_args: Additional arguments of ``forward_func``; they are constants.
            attribute_to_neuron_input: Whether the neuron is one of the layer's input.
            to_layer: The lower layer whose output Y is; None for the input.
            attr_dim_summation: Whether to sum over channels: the neuron's score map.
            grad_kwargs: With ``create_graph=True`` the result can be differentiated, in the inputs and in the model's
                parameters; the other options of ``torch.autograd.grad`` are accepted for compatibility with Captum.
            return_convergence_delta: Whether to return activation - (A·Y + B) too.
            channel_dim: Dimension of the channels; None to find it by the shapes of layer and input.

        Returns:
            Tensor, or tuple, shaped like the input or the output of ``to_layer``, in units of the activation; with the
            delta a pair of it and a tensor (N,).

        Raises:
            TypeError: If an input is not floating point, or the selector has no known form.
            ValueError: If an input or the selector is not as it must be, ``to_layer`` is not below the neuron, or the
                model is in training mode.
            RuntimeError: If ``torch.inference_mode`` is on.
            UnsupportedOperationError: If operations up to the neuron have no rule; all are listed.
        """
        create_graph = check_grad_kwargs(grad_kwargs)
        tensors = check_inputs(inputs, indices=to_layer is not None)
        neuron: Site = (self.layer, attribute_to_neuron_input)
        site: Site | None = None
        if to_layer is not None:
            check_layer(self.forward_func, to_layer)
            site = (to_layer, False)
        channels = channels_at(channel_dim, tensors[0].shape)
        found = explain(
            self._subject(tensors, additional_forward_args),
            partial(select_neuron, selector=neuron_selector),
            [site],
            Reduction(self.multiplies_by_inputs, channels if attr_dim_summation else None, len(tensors[0])),
            keep=return_convergence_delta,
            create_graph=create_graph,
            stop_at=neuron,
        )
        if to_layer is not None and site not in found.reached:
            raise ValueError(
                f"to_layer must lie below the neuron's layer, got a {type(to_layer).__name__} that does not reach this "
                f"{type(self.layer).__name__}. Name a layer between the input and the neuron."
            )
        results, tapped = found.results[site], found.tapped(site)
        single = isinstance(inputs, Tensor) if site is None else not (tapped.is_tuple or is_tuple_of_one(inputs))
        formatted = results[0] if single else results
        return (formatted, found.residual(site)) if return_convergence_delta else formatted


def select_neuron(value: Any, selector: Selector) -> Tensor:
    """Return the activation that a selector names in a layer's output, (N,), or one number where it sums over N."""
    tensors = tuple(tensor for tensor in tensors_in(value) if tensor.is_floating_point())
    if not tensors:
        raise InvalidValueError("layer must have a floating-point output, got none. Name another layer.")
    if callable(selector):
        chosen = selector(tensors if len(tensors) > 1 else tensors[0])
        if not isinstance(chosen, Tensor):
            raise InvalidTypeError(f"neuron_selector must return a tensor (N,), got {type(chosen).__name__}.")
    else:
        index = selector if isinstance(selector, tuple) else (selector,)
        if not all(isinstance(i, (int, np.integer, slice)) and not isinstance(i, bool) for i in index):
            raise InvalidTypeError(
                f"neuron_selector must be an int, a tuple of ints and slices, or a function, got {selector!r}."
            )
        if len(tensors) != 1:
            raise InvalidValueError(
                f"neuron_selector must be a function for a layer of {len(tensors)} tensors, got {selector!r}."
            )
        sizes = tuple(tensors[0].shape[1:])
        if len(index) != len(sizes):
            raise InvalidValueError(
                f"neuron_selector must have {len(sizes)} indices for a layer of {sizes}, got {selector!r}."
            )
        for i, size in zip(index, sizes, strict=True):
            if not isinstance(i, slice) and not -size <= i < size:
                raise InvalidValueError(f"neuron_selector must be from 0 to {size - 1}, got {i}.")
        place: tuple[Any, ...] = (slice(None), *index)
        chosen = tensors[0][place]
        chosen = chosen.flatten(1).sum(1) if chosen.dim() > 1 else chosen
    if chosen.dim() > 1 and chosen[0].numel() == 1:
        chosen = chosen.reshape(-1)
    if chosen.dim() > 1:
        raise InvalidValueError(
            f"neuron_selector must select one number for each image, (N,), got {tuple(chosen.shape)}."
        )
    return chosen
