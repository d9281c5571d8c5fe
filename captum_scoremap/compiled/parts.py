"""What an exported map returns: the scores, the maps, and the other side of the sum, each by name."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from captum_scoremap.attribution import CompleteScoreMap, FusedScoreMap, LayerScoreMap, ScoreMap
from captum_scoremap.checks import as_tuple_of_arguments, unwrap_parallel
from captum_scoremap.layout import channels_at
from captum_scoremap.linear import Reduction, explain
from captum_scoremap.scores import Target, logits_in, select_scores
from captum_scoremap.tape import Site, root_module

__all__ = ["Method", "parts"]

Method = ScoreMap | LayerScoreMap | CompleteScoreMap | FusedScoreMap


def parts(
    method: Method, inputs: Tensor | tuple[Tensor, ...], target: Target, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return scores, maps, B and residuals of one run, by name.

    Args:
        method: The method.
        inputs: The image.
        target: Label of each image, or a function from the model's output to the scores (N,).
        options: Other arguments of ``method.attribute``.

    Returns:
        The parts, in logits: ``scores`` as the model returns them, ``map``, and ``bias`` and ``residual`` or
        ``placeless`` and ``residual``; with the name of the layer, or the number of the input, where there are several.
    """
    outputs: list[Any] = []

    def noted(*args: Any) -> Any:
        outputs.append(method.forward_func(*args))
        return outputs[-1]

    def select(output: Any) -> Tensor:
        outputs.append(output)
        return select_scores(output, target)

    additional = as_tuple_of_arguments(options.get("additional_forward_args"))
    found: dict[str, Tensor] = {}
    if isinstance(method, CompleteScoreMap):
        complete, placeless = method.attribute(inputs, select, additional, return_placeless=True)
        one = complete if isinstance(complete, Tensor) else complete[0]
        score = select_scores(outputs[0], target)
        found = {"map": one, "placeless": placeless, "residual": score - (one.flatten(1).sum(1) + placeless)}
    elif isinstance(method, FusedScoreMap):
        twin = copy.copy(method)
        twin.forward_func = noted  # a function as target would be another score
        fused = twin.attribute(inputs, target, additional)
        found = {"map": fused if isinstance(fused, Tensor) else fused[0]}
    else:
        found = _linear_parts(method, inputs, select, additional, options)
    output = logits_in(outputs[0])
    return {"scores": output if isinstance(output, Tensor) else select_scores(output, target), **found}


def _linear_parts(
    method: ScoreMap | LayerScoreMap,
    inputs: Tensor | tuple[Tensor, ...],
    select: Callable[[Any], Tensor],
    additional: tuple[Any, ...],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Return maps, B and residual of every site: S = A·Y + B."""
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
    sites: list[Site | None] = [None]
    reduction = Reduction(multiply=method.multiplies_by_inputs)
    if isinstance(method, LayerScoreMap):
        sites = [*method._sites(bool(options.get("attribute_to_layer_input")))]
        channels = channels_at(options.get("channel_dim"), tensors[0].shape)
        is_summed = options.get("attr_dim_summation", True)
        reduction = Reduction(method.multiplies_by_inputs, channels if is_summed else None, len(tensors[0]))
    run = explain(method._subject(tensors, additional), select, sites, reduction, keep=True)
    names = _names(method, sites)
    found = {}
    for site, name in zip(sites, names, strict=True):
        results = run.results[site]
        for number, one in enumerate(results):
            found[f"map{name}.{number}" if len(results) > 1 else f"map{name}"] = (
                one.relu() if options.get("relu_attributions") else one
            )
        found[f"bias{name}"] = run.bias(site)
        if reduction.multiply or reduction.channel_dim is None:  # else A·Y is not at hand
            found[f"residual{name}"] = run.score - run.sums(site) - found[f"bias{name}"]
    return found


def _names(method: ScoreMap | LayerScoreMap, sites: list[Site | None]) -> list[str]:
    """Return what follows ``map``: nothing for one layer, else a dot and the layer's name."""
    if len(sites) < 2:
        return [""]
    root = root_module(unwrap_parallel(method.forward_func))
    known = {} if root is None else {module: name for name, module in root.named_modules() if name}
    return [f".{known.get(site[0], number)}" for number, site in enumerate(sites) if site is not None]
