"""Eq. (2)-(3) as objects: the score of a label as A·Y + B with the outputs Y of any layer."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from captum_scoremap.checks import check_callable, check_inputs, check_layers
from captum_scoremap.layout import channels_at
from captum_scoremap.places import Entry, Frame, Placement, frame_of
from captum_scoremap.rules import Rule, tensors_in
from captum_scoremap.scores import Target
from captum_scoremap.tape import Site

from .explanation import Explanation, explain
from .form_table import as_html, as_text
from .ledger import Ledger, ledgers
from .reduction import Reduction, relative_residual
from .subject import Subject

__all__ = ["LinearForm", "LinearForms", "linear_form"]

Tensors = Tensor | tuple[Tensor, ...]

# The most characters of a layer's name that fit over a picture.
_LONG = 24


def _each(function: Callable[[Tensor, Tensor], Tensor], mine: Tensors, others: Tensors) -> Tensors:
    """Return what a function makes of two tensors, or of each pair in two tuples."""
    if isinstance(mine, Tensor) and isinstance(others, Tensor):
        return function(mine, others)
    return tuple(map(function, mine, others))


def _no_entry() -> Entry:
    return None, None


def _weighted(first: Callable[[], Entry], weight: float, second: Callable[[], Entry], other: float) -> Entry:
    """Return the weighted sum of two maps of one layer, and of what stands beside them."""
    pairs = zip(first(), second(), strict=True)
    placed, rest = (None if one is None or two is None else weight * one + other * two for one, two in pairs)
    return placed, rest


def _no_ledger() -> Ledger:
    raise ValueError(
        "complete maps are those of a form of one layer with a place in the image, as linear_form returns it; got "
        "another. Take the complete map of each form first."
    )


@dataclass(frozen=True, eq=False, repr=False)
class LinearForm:
    """The score of a label as an affine function of one layer's output: S = A·Y + B, Eq. (3) of Yu et al. 2015.

    Attributes:
        coefficients: A, shaped like the layer's output (a tuple where it has several).
        activations: Y.
        bias: B, (N,), in logits: the frozen model with the layer at zero.
        score: S, (N,), in logits, as the model gives it.
        sums: Sum of A·Y for each image, (N,), in logits.
        layer: Name of the layer; "input" for the image.
        input_shape: Shape of the input, (N, C, H, W) of an image; as the layers see it, where the model resizes or pads
            it.

    Forms of one layer at one image add up, subtract (the contrast "why this label and not that") and take factors, as
    scores do.

    Example:
        >>> form = linear_form(nn.Linear(3, 2), torch.rand(1, 3), target=0)
        >>> bool(torch.allclose(form.score, form.sub_scores.sum(1) + form.bias))
        True
        >>> double = form + form
        >>> double == 2 * form, double == form
        (True, False)
    """

    coefficients: Tensors
    activations: Tensors
    bias: Tensor
    score: Tensor
    sums: Tensor
    _ledger: Callable[[], Ledger] = field(default=_no_ledger)
    layer: str = ""
    input_shape: tuple[int, ...] = ()
    _frame: Frame | None = None
    _placed: Callable[[], Entry] = field(default=_no_entry)

    def on_image(self, one: Tensor) -> Tensor:
        """Return the part of a map on the layer's grid that is of the image: all of it, unless the model pads images.

        Args:
            one: (N, 1, h, w), such as ``complete_map()``.

        Returns:
            (N, 1, rows, columns), the sum kept but for what stands on padding.

        Example:
            >>> model = nn.Sequential(nn.ZeroPad2d((0, 8, 0, 0)), nn.Conv2d(3, 1, 1), nn.Flatten()).eval()
            >>> form = linear_form(model, torch.rand(1, 3, 8, 8), 0, model[1])
            >>> form.complete_map().shape, form.on_image(form.complete_map()).shape
            (torch.Size([1, 1, 8, 16]), torch.Size([1, 1, 8, 8]))
        """
        return one if self._frame is None else self._frame.cut(one)

    def complete_map(self, size: tuple[int, int] | None = None) -> Tensor:
        """Return the complete map C: the score map plus every constant above the layer, at its place.

        C_l(p) = M_l(p) + sum over the operations k above l of beta_k(p); the sum over positions is S - ``placeless``.
        Read it as sums over regions.

        Args:
            size: Rows and columns; None for the layer's own grid. Sums are kept, but for what stands on padding that
                the model adds to the image.

        Returns:
            In logits, (N, 1, rows, columns).

        Raises:
            ValueError: If the layer has no place in the image, or the form is a sum or multiple of forms.
            RuntimeError: If the model's weights changed in place before this was first asked for.
        """
        return self._ledger().complete_map(size)

    @property
    def placeless(self) -> Tensor:
        """What of S has no place in the image, (N,), in logits: head biases, class tokens."""
        return self._ledger().placeless_sum(self.score)

    @property
    def sub_scores(self) -> Tensors:
        """The products A·Y, in logits, shaped like the layer's output."""
        return _each(torch.mul, self.coefficients, self.activations)

    def score_map(self, channel_dim: int | None = None) -> Tensors:
        """Return the score map M, Eq. (4): the sub-scores summed over channels, kept with size 1.

        Args:
            channel_dim: Dimension of the channels; None to find it by the shapes of layer and input.

        Returns:
            In logits, (N, 1, H, W) for a layer of (N, C, H, W), (N, tokens, 1) for one of (N, tokens, C).

        Raises:
            TypeError: If the dimension is no integer.
            ValueError: If the layer has none of that number, or it is that of the images.
        """
        reduction = Reduction(
            True, channels_at(channel_dim, self.input_shape), self.input_shape[0] if self.input_shape else None
        )
        return _each(reduction, self.coefficients, self.activations)

    @property
    def residual(self) -> Tensor:
        """S - (A·Y + B), (N,), in logits: zero except for rounding. S, A and B come from three computations."""
        return self.score - (self.sums + self.bias)

    @property
    def relative_residual(self) -> Tensor:
        """|residual| / (|S| + |A·Y|), (N,), a fraction."""
        return relative_residual(self.residual, self.score, self.sums)

    def plot(self, image: Any = None, **options: Any) -> tuple[Any, Any]:
        """Draw the score map.

        Args:
            image: What to draw it over, as :func:`captum_scoremap.visualization.visualize_score_map` takes it.
            **options: Further arguments of that function.

        Returns:
            Figure and axes.

        Raises:
            ValueError: If the layer has no place in the image.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
            >>> figure, axes = linear_form(model, torch.rand(1, 3, 6, 6), 7, model[1]).plot()
        """
        from captum_scoremap.visualization import visualize_score_map

        if not isinstance(self.coefficients, Tensor) or not isinstance(self.activations, Tensor):
            raise ValueError(f"the layer must give one tensor to be drawn, got {len(self.activations)}.")
        placed, rest = self._placed()
        if placed is None:
            raise ValueError(
                "the layer must have a place in the image to be drawn, (N, C, h, w) or (N, tokens, C), got "
                f"{tuple(self.activations.shape)} at no positions of it. Take a layer below."
            )
        if len(self.score) == 1:
            name = self.layer or "layer"
            lines = [name if len(name) <= _LONG else f"…{name[1 - _LONG :]}", "S = Σ A·Y + B"]
            lines.append(f"{float(self.score):.2f} = {float(self.sums):.2f} + {float(self.bias):.2f}")
            if rest is not None:
                lines.append(f"{float(rest):.2f} without a place")
            options = {"title": "\n".join(lines), **options}
        return visualize_score_map(self.on_image(placed), image, **options)

    def __repr__(self) -> str:
        parts = zip(self.score, self.sums, self.bias, strict=True)
        shown = [f"{score:.4f} = {total:.4f} + {bias:.4f}" for score, total, bias in list(parts)[:3]]
        dots = ", ..." if len(self.score) > len(shown) else ""
        shapes = ", ".join(str(tuple(y.shape)) for y in tensors_in(self.activations))
        return f"LinearForm({self.layer or 'layer'} {shapes}: S = A·Y + B = {', '.join(shown)}{dots})"

    def _repr_html_(self) -> str:
        return as_html([self])

    def __eq__(self, other: object) -> bool:
        """Return whether A, Y, B and S are equal, number by number."""
        if not isinstance(other, LinearForm):
            return NotImplemented
        return _are_equal(self._tensors(), other._tensors())

    def __hash__(self) -> int:
        return hash(tuple(self.score.tolist()))

    def __add__(self, other: object) -> "LinearForm":
        """Return the form of the sum of two scores; Y is the same."""
        return self._combined(other, 1, 1)

    def __radd__(self, other: object) -> "LinearForm":
        """Return the form itself, as ``sum`` begins, with 0."""
        if isinstance(other, int) and other == 0:
            return self
        return NotImplemented

    def __sub__(self, other: object) -> "LinearForm":
        """Return the contrast "why this label and not that": coefficients, bias and score subtracted; Y is the same."""
        return self._combined(other, 1, -1)

    def __mul__(self, factor: float) -> "LinearForm":
        """Return the form of a multiple of the score."""
        return self._combined(self, factor, 0) if isinstance(factor, (int, float)) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "LinearForm":
        """Return the form of a fraction of the score."""
        return self * (1 / divisor) if isinstance(divisor, (int, float)) else NotImplemented

    def __neg__(self) -> "LinearForm":
        return self * -1

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: the complete map as numbers, rather than the run it is made of."""
        try:
            ledger: Callable[[], Ledger] = partial(copy, self._ledger())
        except ValueError:  # there is none
            ledger = _no_ledger
        return {**vars(self), "_ledger": ledger, "_placed": partial(tuple, self._placed())}

    def _tensors(self) -> list[Tensor]:
        return list(tensors_in((self.coefficients, self.activations, self.bias, self.score)))

    def _combined(self, other: object, mine: float, others: float) -> "LinearForm":
        """Return the weighted sum of two forms of one layer."""
        if not isinstance(other, LinearForm):
            return NotImplemented  # type: ignore[no-any-return]
        if not _are_equal(list(tensors_in(self.activations)), list(tensors_in(other.activations))):
            raise ValueError(
                "two linear forms must be of the same layer at the same image to be added or subtracted; got different "
                "activations."
            )

        def combined(one: Tensor, another: Tensor) -> Tensor:
            return mine * one + others * another if others else mine * one

        return replace(
            self,
            coefficients=_each(combined, self.coefficients, other.coefficients),
            bias=combined(self.bias, other.bias),
            score=combined(self.score, other.score),
            sums=combined(self.sums, other.sums),
            _ledger=_no_ledger,
            _placed=partial(_weighted, self._placed, mine, other._placed, others),
        )


def _are_equal(mine: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether tensors are equal, number by number; those of other types or devices are not."""
    kinds, other_kinds = ([(t.shape, t.dtype, t.device) for t in tensors] for tensors in (mine, others))
    return kinds == other_kinds and all(map(torch.equal, mine, others))


class LinearForms(list[LinearForm]):
    """The linear forms of several layers, a list that prints as a table.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> for parameter in model.parameters():
        ...     _ = nn.init.ones_(parameter)
        >>> linear_form(model, torch.ones(1, 3), target=0, layer=[None, model[0]])
        layer  size   Σ A·Y       B       S  residual
        input     3  6.0000  3.0000  9.0000   0.0e+00
        0         2  8.0000  1.0000  9.0000   0.0e+00
    """

    def __repr__(self) -> str:
        return as_text(self) if self else "[]"

    def _repr_html_(self) -> str:
        return as_html(self)


@overload
def linear_form(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    target: Target = None,
    layer: nn.Module | None = None,
    additional_forward_args: object = None,
    *,
    attribute_to_layer_input: bool = False,
    rules: Mapping[Any, Rule] | None = None,
) -> LinearForm: ...
@overload
def linear_form(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    target: Target = None,
    layer: Sequence[nn.Module | None] = ...,
    additional_forward_args: object = None,
    *,
    attribute_to_layer_input: bool = False,
    rules: Mapping[Any, Rule] | None = None,
) -> LinearForms: ...
def linear_form(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    target: Target = None,
    layer: nn.Module | Sequence[nn.Module | None] | None = None,
    additional_forward_args: object = None,
    *,
    attribute_to_layer_input: bool = False,
    rules: Mapping[Any, Rule] | None = None,
) -> LinearForm | LinearForms:
    """Return the score of a label as A·Y + B with the output Y of a layer, Eq. (3) of Yu et al. 2015.

    A comes from one backward pass, B from the frozen model with the layer set to zero, S from the model itself, so that
    ``residual`` is a check of all three.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        inputs: The image, (N, C, H, W), or a tuple of such inputs.
        target: Label of each image, in any of Captum's forms, or a function from the model's output to (N,).
        layer: The layer; None for the image itself; or several, for which one run and one backward pass serve. If one
            runs more than once, its last call counts. One that does not depend on the input is a constant factor where
            it multiplies what does.
        additional_forward_args: Additional arguments; they are constants.
        attribute_to_layer_input: Whether Y is the layer's input.
        rules: Operation to rule, to replace or add some.

    Returns:
        The linear form; for several layers a list of them, which prints as a table.

    Raises:
        TypeError: If the model is compiled or scripted, an input is not floating point, or the layer is no module.
        ValueError: If an input, the target or the layer is not as it must be.
        RuntimeError: If ``torch.inference_mode`` is on.
        UnsupportedOperationError: If operations have no rule; all are listed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> form = linear_form(model, torch.rand(2, 3, 6, 6), target=7, layer=model[1])
        >>> form.score_map().shape
        torch.Size([2, 1, 4, 4])
        >>> bool(form.relative_residual.max() < 1e-5)
        True
    """
    check_callable(forward_func)
    layers: list[nn.Module | None] = check_layers(forward_func, layer, or_image=True)
    if not layers:
        raise ValueError("layer must name at least one module, got none. Leave it out for the image itself.")
    tensors = check_inputs(inputs, indices=None not in layers)
    sites: list[Site | None] = [None if one is None else (one, attribute_to_layer_input) for one in layers]
    subject = Subject(forward_func, tensors, additional_forward_args, rules)
    run = _Run(explain(subject, target, sites, Reduction(multiply=False), keep=True), sites, inputs)
    forms = LinearForms(map(run.form, sites))
    return forms[0] if layer is None or isinstance(layer, nn.Module) else forms


class _Run:
    """A run that forms are read off, and what stands where in the image, which is found when it is first asked for."""

    def __init__(self, found: Explanation, sites: Sequence[Site | None], inputs: Tensors) -> None:
        self._found, self._sites = found, sites
        self._has_one_input = isinstance(inputs, Tensor)
        self._shape = tuple((inputs if isinstance(inputs, Tensor) else inputs[0]).shape)
        self._frame = frame_of(found.tape, self._shape) if len(self._shape) == 4 else None
        self._check_constants = found.tape.check_of_constants(
            "the linear form", "Ask for the complete map before changing them, or make the form anew."
        )

    def form(self, site: Site | None) -> LinearForm:
        """Return the form at a site."""
        coefficients, tapped = self._found.results[site], self._found.tapped(site)
        activations = tuple(y.clone() for y in tapped.activations)
        is_single = self._has_one_input if site is None else not tapped.is_tuple
        name = "input" if site is None else self._found.recording.modules.name_of(site[0]) or type(site[0]).__name__
        frame = None if site is None else self._frame
        return LinearForm(
            coefficients[0] if is_single else coefficients,
            activations[0] if is_single else activations,
            self._found.bias(site),
            self._found.score,
            self._found.sums(site),
            partial(self._ledger, site),
            name,
            self._shape if frame is None else frame.shape,
            frame,
            cache(partial(self._placed, site)),
        )

    def _ledger(self, site: Site | None) -> Ledger:
        has_place = len(self._shape) == 4 and all(y.dim() >= 3 for y in self._found.tapped(site).activations)
        return self._ledgers[site] if has_place else _no_ledger()

    @cached_property
    @torch.no_grad()
    def _ledgers(self) -> dict[Site | None, Ledger]:
        self._check_constants()
        score, recording = self._found.score, self._found.recording
        seeds = recording.tape.seeds(torch.ones_like(score))
        return dict(zip(self._sites, ledgers(recording, seeds, score, self._sites, self._shape), strict=True))

    @torch.no_grad()
    def _placed(self, site: Site | None) -> Entry:
        tapped = self._found.tapped(site)
        if len(self._shape) != 4 or len(tapped.values) != 1:
            return _no_entry()
        return self._placement(self._found.results[site][0] * tapped.activations[0], tapped.values[0])

    @cached_property
    def _placement(self) -> Placement:
        return Placement(self._found.tape, self._shape)
