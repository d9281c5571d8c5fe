"""FusedScoreMap: one input-sized saliency map from the score maps of several layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor, nn

from captum_scoremap.checks import check_images
from captum_scoremap.linear import Subject
from captum_scoremap.places import Frame, Placement
from captum_scoremap.rules import Rule
from captum_scoremap.scores import Target, is_function, logits_in, select_scores
from captum_scoremap.tape import Site, Tape, Tapped

from .contract import Contract
from .default_layers import DefaultLayers, named_layers

__all__ = ["FusedScoreMap"]


class FusedScoreMap(Contract):
    """One map of the size of the image that says where the evidence for a label is, and against all other labels.

    A late layer's score map knows what is where, but only coarsely; an early one shows detail, but also much that has
    nothing to do with the label. The fused map takes the detail of all resolutions, as each finer one says better which
    pixels of an object count, and trusts it where the last one does:

    1. The score that is explained is the label's log-odds, L = S_c - log sum over the others of exp S_k, whose
       sigmoid is the label's probability: what also speaks for another label is no evidence for this one.
    2. R, the detail: the score maps of L of the image itself and of all layers, each divided by its largest absolute
       value and interpolated to the size of the image, are added.
    3. G, the trust: as L = sum of M + B is exact, h·w·M(x, y) + B is the log-odds if the last layer, of h x w
       positions, looked everywhere as it does at (x, y), and G its sigmoid: the probability of the label there.
    4. The map is R² G where R is positive, and -R² where it is negative.
    5. Cells of a layer that add nothing at all to the label's own score S_c, whose score map is exactly zero there, are
       exactly zero: what the label does not see is no evidence for it, whatever it says against others. A layer beside
       the way to S_c, as one of another head, does not count.

    It is a map for looking, pointing and cropping, without unit; for one that adds up to the score take
    :class:`LayerScoreMap`. Labels must compete in a softmax; where the model has one score for each image, or the
    target is a function, that is taken for the log-odds, as before a sigmoid. It takes one forward and two backward
    passes, of which the second ends at the first of the layers, and at the first image of each size, and of each route
    through a model that branches, one or two more forward passes that find the layers.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        layers: A module or several, in the order in which they run, with outputs (N, C, h, w) or (N, h, w, C), or
            tokens, of which class and register tokens are left out; None for the last main layer of each resolution
            (main layers: those that the fewest modules enclose), of transformers of one resolution for the blocks at
            their quarters.
        rules: Operation to rule, to replace or add some.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(200, 10)
        ... ).eval()
        >>> FusedScoreMap(model).attribute(torch.rand(2, 3, 16, 16), target=7).shape
        torch.Size([2, 1, 16, 16])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layers: nn.Module | Sequence[nn.Module] | None = None,
        *,
        rules: Mapping[Any, Rule] | None = None,
    ) -> None:
        super().__init__(forward_func, rules)
        self._layers = named_layers(forward_func, layers)
        self._default_layers = DefaultLayers()

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object = None,
    ) -> Any:
        """Return the fused map of the image.

        Args:
            inputs: The image, (N, C, H, W).
            target: Label of each image, in any of Captum's forms, or a function from the model's output to (N,).
            additional_forward_args: Additional arguments of ``forward_func``; they are constants.

        Returns:
            Tensor (N, 1, H, W), in a tuple if ``inputs`` is one; positive where there is evidence for the label.

        Raises:
            TypeError: If the input is not floating point, or a target has no known form.
            ValueError: If the input, the target or a layer is not as it must be, or the model is in training mode.
            RuntimeError: If ``torch.inference_mode`` is on.
            UnsupportedOperationError: If operations have no rule; all are listed.
        """
        image = check_images(inputs)
        subject = self._subject((image,), additional_forward_args)
        if self._layers is None:
            fused = self._default_layers.explained(
                subject, target, lambda subject, layers: _fused(subject, target, list(layers))
            )
        else:
            fused = _fused(subject, target, self._layers)
        return fused if isinstance(inputs, Tensor) else (fused,)


def _fused(subject: Subject, target: Target, layers: Sequence[nn.Module]) -> Tensor:
    """Return the fused map, (N, 1, H, W)."""
    (image,) = subject.inputs
    if not layers:
        raise ValueError("layers must be named for this model, for none of its modules returns a map (N, C, h, w).")
    sites: list[Site] = [(layer, False) for layer in layers]

    def select(output: Any) -> Tensor:
        scores = select_scores(output, target, len(image))
        return scores if is_function(target) else logits_in(output)

    recording, output = subject.record(select, sites)
    label = None if is_function(target) else target
    with torch.enable_grad():
        leaf = output.detach().requires_grad_()
        score, odds = select_scores(leaf, label), log_odds(leaf, label)
        of_odds, of_score = (torch.autograd.grad(one.sum(), leaf)[0] for one in (odds, score))
    placement = Placement(recording.tape, image.shape)
    frame = placement.frame
    with torch.no_grad():
        image_itself, *named = (_Layer(recording.tapped[site], site, placement) for site in (None, *sites))
        fused = fuse(_score_maps(recording.tape, of_odds, [image_itself, *named]), odds.detach(), frame)
        for score_map in _score_maps(recording.tape, of_score, named):
            has_part = score_map != 0
            is_aside = ~has_part.flatten(1).any(1)[:, None, None, None]  # the score does not depend on the layer
            fused = fused * frame.enlarged((has_part | is_aside).to(fused), "nearest-exact")
    return fused


def log_odds(output: Tensor, target: Target) -> Tensor:
    """Return the log-odds of a label, (N,): S_c - log sum over all others of exp S_k; of (N,) or (N, 1), the score."""
    score = select_scores(output, target)
    if output.dim() == 1 or output.shape[1] == 1:
        return score
    with torch.enable_grad():
        probe = output.detach().requires_grad_()
        (chosen,) = torch.autograd.grad(select_scores(probe, target).sum(), probe)
    chosen = chosen.bool()
    rivals = output.masked_fill(chosen, -torch.inf).logsumexp(dim=1)
    # the one place, where there are several, without a shape that depends on numbers
    return score - rivals.where(chosen.any(dim=1), 0).reshape(len(score), -1).sum(dim=1)


def fuse(score_maps: Sequence[Tensor], odds: Tensor, frame: Frame) -> Tensor:
    """Fuse score maps of the log-odds, (N, 1, h, w), the last layer's at the end, as :class:`FusedScoreMap` says."""
    last = score_maps[-1]
    bias = odds[:, None, None, None] - last.sum(dim=(2, 3), keepdim=True)
    belief = frame.enlarged(last[0, 0].numel() * last + bias).sigmoid()
    smallest = torch.finfo(last.dtype).tiny
    scaled = [one / one.abs().amax(dim=(2, 3), keepdim=True).clamp_min(smallest) for one in score_maps]
    detail = torch.stack([frame.enlarged(one) for one in scaled]).sum(dim=0)
    energy = detail * detail.abs()
    return torch.where(energy > 0, energy * belief, energy)


class _Layer:
    """A layer's one tensor, with a place in the image, and what its score map is for given coefficients."""

    def __init__(self, tapped: Tapped, site: Site | None, placement: Placement) -> None:
        activations = tapped.activations
        zeros = None
        if len(activations) == 1:
            zeros, _ = placement(torch.zeros_like(activations[0]), tapped.values[0])
        if zeros is None:
            got = ", ".join(str(tuple(tensor.shape)) for tensor in activations)
            raise ValueError(
                "layers must return maps (N, C, h, w) or tokens (N, tokens, C) of the image's positions, got "
                f"{got} from a {type(site and site[0]).__name__}."
            )
        (self.value,), (self._activations,) = tapped.values, activations
        self._placement, self.zeros = placement, zeros

    def score_map(self, coefficients: Tensor) -> Tensor:
        """Return the score map, (N, 1, h, w)."""
        found, _ = self._placement(coefficients * self._activations, self.value)
        return self.zeros if found is None else found


def _score_maps(tape: Tape, coefficients: Tensor, layers: Sequence[_Layer]) -> list[Tensor]:
    """Return the score maps of layers, (N, 1, h, w), for given coefficients of the output; zero where it has none."""
    found = tape.transposed(tape.seeds(coefficients), {layer.value: layer.score_map for layer in layers})
    return [found.get(layer.value, layer.zeros) for layer in layers]
