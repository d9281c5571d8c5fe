"""LayerScoreMap: the score maps of a layer, or of several from one backward pass."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_scoremap.checks import check_grad_kwargs, check_inputs, check_layers, is_tuple_of_one
from captum_scoremap.layout import as_images, channels_at
from captum_scoremap.linear import Reduction, explain, explain_targets
from captum_scoremap.rules import Rule
from captum_scoremap.scores import Label, Target
from captum_scoremap.tape import Site

from .contract import Contract

__all__ = ["LayerScoreMap"]


class LayerScoreMap(LayerAttribution, Contract):
    """The score map of a layer: M(x, y) = sum over channels of A·Y, Eq. (4) of Yu et al. 2015.

    S = A·Y + B holds for the output Y of every layer; the map says what each of its positions adds to the score. With
    ``attr_dim_summation=False`` the sub-scores A·Y themselves are returned, which for piecewise-linear networks are
    those of Captum's ``LayerGradientXActivation``.

    Goes wherever Captum takes a layer method: ``NoiseTunnel``, ``sensitivity_max``, and, with
    ``multiply_by_inputs=False`` and ``attr_dim_summation=False``, ``TCAV``. ``LLMGradientAttribution`` asks for one of
    three classes by name; a subclass whose ``SUPPORTED_METHODS`` has this one too takes it.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        layer: A module, or a list of modules, for which one run and one backward pass serve. If a module runs more
            than once, its last call counts. None where it is set later, as TCAV does; such a method returns no sums
            over channels.
        device_ids: Accepted for compatibility with Captum: a ``DataParallel`` model is explained on the device of its
            module.
        multiply_by_inputs: Whether to multiply by the activations Y; else the coefficients A are returned.
        memory_efficient: Accepted for compatibility with Captum: activations are freed during the backward pass.
        rules: Operation to rule, to replace or add some.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> method = LayerScoreMap(model, model[1])
        >>> score_map, delta = method.attribute(torch.rand(2, 3, 6, 6), target=7, return_convergence_delta=True)
        >>> score_map.shape, bool(delta.abs().max() < 1e-5)
        (torch.Size([2, 1, 4, 4]), True)
        >>> method.attribute_targets(torch.rand(2, 3, 6, 6)).shape  # every label
        torch.Size([2, 10, 4, 4])
        >>> LayerScoreMap.interpolate(score_map, (6, 6)).shape
        torch.Size([2, 1, 6, 6])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module] | None,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
        memory_efficient: bool = False,
        *,
        rules: Mapping[Any, Rule] | None = None,
    ) -> None:
        layers = None if layer is None else check_layers(forward_func, layer)
        self._made_for = layer if isinstance(layer, nn.Module) else layers
        # Captum declares a type variable where it means either
        LayerAttribution.__init__(self, forward_func, self._made_for, device_ids)  # type: ignore[type-var]
        Contract.__init__(self, forward_func, rules, multiply_by_inputs)

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool | Mapping[str, Any] = False,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
        return_convergence_delta: bool = False,
        channel_dim: int | None = None,
    ) -> Any:
        """Return the score map, or the sub-scores, of the layer.

        Args:
            inputs: The image, (N, C, H, W), or a tuple of such inputs; tokens may be int64.
            target: Label of each image, in any of Captum's forms, or a function from the model's output to (N,).
            additional_forward_args: Additional arguments of ``forward_func``; they are constants.
            attribute_to_layer_input: Whether Y is the layer's input.
            relu_attributions: Whether to return the positive part only. ``grad_kwargs``, if it comes fifth, as in
                Captum's ``LayerGradientXActivation``.
            attr_dim_summation: Whether to sum over channels.
            grad_kwargs: With ``create_graph=True`` the result can be differentiated, in the inputs and in the model's
                parameters; the other options of ``torch.autograd.grad`` are accepted for compatibility with Captum.
            return_convergence_delta: Whether to return S - (A·Y + B) too, with B from the frozen model with the layer
                at zero.
            channel_dim: Dimension of the channels; None to find it by the shapes of layer and input: the last for
                (N, h, w, C), (N, tokens, C) and (tokens, N, C), else the first after the images.

        Returns:
            Tensor in logits, (N, 1, h, w) for a layer of (N, C, h, w), (N, tokens, 1) for one of (N, tokens, C), or
            shaped like the layer without summation; a tuple for a layer with several tensors, and for an input that is
            a tuple of one, as in ``sensitivity_max``; a list for a list of layers. With the delta a pair of that and a
            tensor (N,), or a list of them.

        Raises:
            TypeError: If an input is not floating point, or a target has no known form.
            ValueError: If an input, the target or the layer is not as it must be, or the model is in training mode.
            RuntimeError: If ``torch.inference_mode`` is on.
            UnsupportedOperationError: If operations have no rule; all are listed.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
            >>> image = torch.rand(1, 3, 6, 6)
            >>> score_map = LayerScoreMap(model, model[1]).attribute(image, target=7)
            >>> score_map.shape
            torch.Size([1, 1, 4, 4])
            >>> sub_scores = LayerScoreMap(model, model[1]).attribute(image, 7, attr_dim_summation=False)
            >>> bool(torch.allclose(sub_scores.sum(1, keepdim=True), score_map, atol=1e-6))
            True
        """
        if isinstance(relu_attributions, Mapping):  # where LayerGradientXActivation has it
            grad_kwargs, relu_attributions = dict(relu_attributions), False
        create_graph = check_grad_kwargs(grad_kwargs)
        tensors = check_inputs(inputs, indices=True)
        sites = self._sites(attribute_to_layer_input)
        channels = channels_at(channel_dim, tensors[0].shape)
        if attr_dim_summation and self.layer is not self._made_for:
            raise ValueError(
                "attr_dim_summation must be False where the layer is set later, as TCAV does, which takes coefficients "
                "shaped like the layer: LayerScoreMap(model, None, multiply_by_inputs=False) and "
                "tcav.interpret(..., attr_dim_summation=False). For a score map, name the layer when making the method."
            )
        found = explain(
            self._subject(tensors, additional_forward_args),
            target,
            sites,
            Reduction(self.multiplies_by_inputs, channels if attr_dim_summation else None, len(tensors[0])),
            keep=return_convergence_delta,
            create_graph=create_graph,
        )
        maps, deltas = [], []
        for site in sites:
            results, tapped = found.results[site], found.tapped(site)
            if return_convergence_delta:
                if not self.multiplies_by_inputs and attr_dim_summation:
                    raise ValueError(
                        "return_convergence_delta needs A·Y, got coefficients summed over channels. Use "
                        "multiply_by_inputs=True or attr_dim_summation=False."
                    )
                deltas.append(found.residual(site))
            results = tuple(map(F.relu, results)) if relu_attributions else results
            maps.append(results if tapped.is_tuple or is_tuple_of_one(inputs) else results[0])
        return self._formatted(maps, deltas if return_convergence_delta else None)

    def attribute_targets(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Sequence[Label] | None = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        channel_dim: int | None = None,
        internal_batch_size: int | None = None,
    ) -> Any:
        """Return the score maps of many labels from one forward pass.

        Either the score of each label is pushed back through the frozen layers above (one pass per label), or the
        activation of each position alone is pushed forward through them (one pass per position, all labels at once);
        whichever are fewer, in batches.

        ``targets`` are labels, the same for all images, or functions from the model's output to (N,); None for every
        label. ``internal_batch_size`` bounds the images processed at once, and thereby memory; None for a moderate
        number. The other arguments, and the errors, are those of :meth:`attribute`.

        Returns:
            Tensor in logits, (N, K, h, w) for a layer of (N, C, h, w): the labels take the place of the channels. A
            list for a list of layers.
        """
        tensors = check_inputs(inputs, indices=True)
        maps = explain_targets(
            self._subject(tensors, additional_forward_args),
            targets,
            self._sites(attribute_to_layer_input),
            Reduction(self.multiplies_by_inputs, channels_at(channel_dim, tensors[0].shape), len(tensors[0])),
            internal_batch_size,
        )
        if relu_attributions:
            maps = [F.relu(one) for one in maps]
        return self._formatted(maps, None)

    @staticmethod
    def interpolate(
        layer_attribution: Tensor, interpolate_dims: int | tuple[int, ...], interpolate_mode: str = "nearest"
    ) -> Tensor:
        """Enlarge a map, as Captum does; maps of tokens are laid out first.

        Class and register tokens have no place in the image; :func:`captum_scoremap.token_grid` says what they add.

        Args:
            layer_attribution: (N, C, h, w), (N, C, length) for a single dimension; or a map that :meth:`attribute` made
                of a layer of tokens, (N, tokens, 1) or (tokens, N, 1), or of (N, h, w, C), (N, h, w, 1).
            interpolate_dims: Rows and columns.
            interpolate_mode: As in ``torch.nn.functional.interpolate``.

        Returns:
            (N, C, rows, columns).

        Raises:
            ValueError: If tokens are no square but for up to eight. Lay them out with ``token_grid`` first.
        """
        if not isinstance(interpolate_dims, int) and len(interpolate_dims) == 2:
            layer_attribution = as_images(layer_attribution)
        return LayerAttribution.interpolate(layer_attribution, interpolate_dims, interpolate_mode)

    def compute_convergence_delta(
        self,
        attributions: Any,
        start_point: object,
        end_point: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Return S - (A·Y + B), (N,) in logits, for what :meth:`attribute` returned before.

        ``start_point`` must be None or zero, where B is taken; ``end_point`` is the image.

        Returns:
            The delta; a list for a list of layers.

        Raises:
            ValueError: If the maps do not fit the layer, or the start point is not zero.
        """
        given = attributions if isinstance(self.layer, (list, tuple)) else [attributions]
        deltas = [
            self._delta(site, one, start_point, end_point, target, additional_forward_args)
            for site, one in zip(self._sites(attribute_to_layer_input), given, strict=True)
        ]
        return deltas if isinstance(self.layer, (list, tuple)) else deltas[0]

    def _sites(self, at_input: bool) -> list[Site]:
        return [(layer, at_input) for layer in check_layers(self.forward_func, self.layer)]

    def _formatted(self, maps: list[Any], deltas: list[Tensor] | None) -> Any:
        if isinstance(self.layer, (list, tuple)):
            return maps if deltas is None else (maps, deltas)
        return maps[0] if deltas is None else (maps[0], deltas[0])
