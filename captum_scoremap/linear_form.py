"""Eq. (2)-(3) as objects: the score of a label as A·Y + B with the outputs Y of any layer."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_scoremap.checks import check_callable, check_inputs, check_layer, unwrap_parallel
from captum_scoremap.freeze import FrozenModel, Recording, Reduction, Site, Tag, Tapped, as_tuple_of_arguments
from captum_scoremap.rules import Call, Frozen, Rule, substituted, tensors_in, with_rules

__all__ = ["Explanation", "LinearForm", "bias_terms", "explain", "linear_form", "select_scores"]

Target = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
Tensors = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class LinearForm:
    """The score of a label as an affine function of one layer's output: S = A·Y + B, Eq. (3) of Yu et al. 2015.

    Attributes:
        coefficients: A, shaped like the layer's output (a tuple where it has several).
        activations: Y.
        bias: B, (N,), in logits: the frozen model with the layer at zero.
        score: S, (N,), in logits, as the model gives it.
        sums: Sum of A·Y for each image, (N,), in logits.

    Example:
        >>> form = linear_form(nn.Linear(3, 2), torch.rand(1, 3), target=0)
        >>> bool(torch.allclose(form.score, form.sub_scores.sum(1) + form.bias))
        True
    """

    coefficients: Tensors
    activations: Tensors
    bias: Tensor
    score: Tensor
    sums: Tensor

    @property
    def sub_scores(self) -> Tensors:
        """The products A·Y, in logits, shaped like the layer's output."""
        if isinstance(self.coefficients, Tensor) and isinstance(self.activations, Tensor):
            return self.coefficients * self.activations
        return tuple(a * y for a, y in zip(self.coefficients, self.activations, strict=True))

    def score_map(self, channel_dim: int = 1) -> Tensors:
        """The score map M, Eq. (4): the sub-scores summed over channels, kept with size 1.

        Args:
            channel_dim: Dimension of the channels; -1 for tokens, (N, tokens, C).

        Returns:
            In logits, (N, 1, H, W) for a layer of (N, C, H, W).
        """
        reduction = Reduction(channel_dim=channel_dim)
        if isinstance(self.coefficients, Tensor) and isinstance(self.activations, Tensor):
            return reduction(self.coefficients, self.activations)
        return tuple(reduction(a, y) for a, y in zip(self.coefficients, self.activations, strict=True))

    @property
    def residual(self) -> Tensor:
        """S - (A·Y + B), (N,), in logits: zero but for rounding. S, A and B come from three different computations."""
        return self.score - (self.sums + self.bias)

    @property
    def relative_residual(self) -> Tensor:
        """|residual| / (|S| + |A·Y|), (N,), a fraction."""
        scale = self.score.abs() + self.sums.abs()
        return self.residual.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)

    def __sub__(self, other: "LinearForm") -> "LinearForm":
        """The contrast "why this label and not that": coefficients, bias and score subtracted; Y is the same."""
        if not isinstance(other, LinearForm):
            return NotImplemented
        mine, others = list(tensors_in(self.activations)), list(tensors_in(other.activations))
        if [t.shape for t in mine] != [t.shape for t in others] or not all(map(torch.equal, mine, others)):
            raise ValueError(
                "two linear forms must be of the same layer at the same image to be subtracted; got different "
                "activations."
            )
        if isinstance(self.coefficients, Tensor) and isinstance(other.coefficients, Tensor):
            coefficients: Tensors = self.coefficients - other.coefficients
        else:
            coefficients = tuple(a - b for a, b in zip(self.coefficients, other.coefficients, strict=True))
        return LinearForm(
            coefficients,
            self.activations,
            self.bias - other.bias,
            self.score - other.score,
            self.sums - other.sums,
        )


@dataclass(frozen=True)
class Explanation:
    """One recorded run and its backward pass.

    Attributes:
        score: S, (N,).
        results: For each site the reductions of A and Y; key None for the input.
        reached: For each site whether the scores depend on it at all.
        recording: The run.
    """

    score: Tensor
    results: dict[Site | None, tuple[Tensor, ...]]
    reached: dict[Site | None, bool]
    recording: Recording

    def tapped(self, site: Site | None) -> Tapped:
        """The tensors of a site."""
        return self.recording.input_taps if site is None else self.recording.tapped[site]

    def frozen(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...]) -> FrozenModel:
        """The frozen model of a run that kept what it froze."""
        recording = self.recording
        return FrozenModel(
            recording.forward_func, recording.rules, recording.entries, recording.calls, inputs, additional
        )


def explain(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    select: Callable[[Any], Tensor],
    sites: Sequence[Site | None],
    reduction: Reduction,
    additional: tuple[Any, ...] = (),
    *,
    rules: Mapping[Any, Rule] | None = None,
    keep: bool = False,
    stop_at: Site | None = None,
    grad_kwargs: Mapping[str, Any] | None = None,
) -> Explanation:
    """Record a run and take, in one backward pass, what is wanted of A and Y at every site.

    Args:
        forward_func: The model, or a function that calls it.
        inputs: The image.
        select: From the model's output to the scores (N,).
        sites: Places in the model; None is the input.
        reduction: What to make of A and Y there.
        additional: Further arguments.
        rules: Rules to replace or add.
        keep: Whether to keep what is frozen, for :meth:`Explanation.frozen`, and the activations of the sites.
        stop_at: A site after which the run ends; its value is the output.
        grad_kwargs: Further arguments of ``torch.autograd.grad``.

    Returns:
        The explanation; nothing in it carries a graph.

    Raises:
        ValueError: If a layer did not run, or gives no floating-point tensor.
    """
    table, trusted = with_rules(rules), with_rules(None)
    taps = {site: reduction for site in sites if site is not None}
    once = not keep and not grad_kwargs
    recording = Recording(forward_func, table, taps, keep=keep, trusted=trusted, stop_at=stop_at, once=once)
    with torch.enable_grad():
        output = recording.record(inputs, additional, reduction if None in sites else None)
        check_sites(recording, taps, stop_at)
        if stop_at is not None and not recording.calls[stop_at[0]]:
            raise ValueError(f"layer must run when the model does, got a {type(stop_at[0]).__name__} that never ran.")
        if stop_at is None:
            warn_of_probabilities(recording, output)
        score = select(output)
        total = score.sum()
    tapped = {site: recording.input_taps if site is None else recording.tapped[site] for site in sites}
    anchors = [anchor for one in tapped.values() for anchor in one.anchors]
    if total.requires_grad:
        options = {"allow_unused": True, **(grad_kwargs or {})}
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(total, anchors, **options)
    else:
        gradients = tuple(None for _ in anchors)
    by_anchor = {id(anchor): gradient for anchor, gradient in zip(anchors, gradients, strict=True)}
    results, reached = {}, {}
    for site, one in tapped.items():
        found = [by_anchor[id(anchor)] for anchor in one.anchors]
        reached[site] = any(gradient is not None for gradient in found)
        results[site] = tuple(
            torch.zeros_like(anchor) if gradient is None else gradient.detach()
            for anchor, gradient in zip(one.anchors, found, strict=True)
        )
    return Explanation(score.detach(), results, reached, recording)


def linear_form(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    target: Target = None,
    layer: nn.Module | None = None,
    additional_forward_args: object = None,
    *,
    attribute_to_layer_input: bool = False,
    rules: Mapping[Any, Rule] | None = None,
) -> LinearForm:
    """The score of a label as A·Y + B with the output Y of a layer, Eq. (3) of Yu et al. 2015.

    A comes from one backward pass, B from the frozen model with the layer set to zero, S from the model itself, so that
    ``residual`` is a check of all three.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        inputs: The image, (N, C, H, W), or a tuple of such inputs.
        target: Label of each image, in any of Captum's forms.
        layer: The layer; None for the image itself. If it runs more than once, its last call counts.
        additional_forward_args: Further arguments; they are constants.
        attribute_to_layer_input: Whether Y is the layer's input.
        rules: Operation to rule, to replace or add some.

    Returns:
        The linear form.

    Raises:
        TypeError: If the model's inside cannot be seen, an input is not floating point, or the layer is no module.
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
    tensors = check_inputs(inputs, indices=layer is not None)
    site: Site | None = None
    if layer is not None:
        check_layer(forward_func, layer)
        site = (layer, attribute_to_layer_input)
    forward_func = unwrap_parallel(forward_func)
    additional = as_tuple_of_arguments(additional_forward_args)

    def select(output: Any) -> Tensor:
        return select_scores(output, target)

    found = explain(
        forward_func, tensors, select, [site], Reduction(multiply=False), additional, rules=rules, keep=True
    )
    coefficients, activations = found.results[site], found.tapped(site).activations
    sums = image_sums(coefficients, activations, found.score)
    bias = bias_at(found.frozen(tensors, additional), site, activations, select)
    single = isinstance(inputs, Tensor) if site is None else not found.tapped(site).is_tuple
    return LinearForm(
        coefficients[0] if single else coefficients,
        activations[0].clone() if single else tuple(y.clone() for y in activations),
        bias,
        found.score,
        sums,
    )


def bias_at(
    frozen: FrozenModel,
    site: Site | None,
    activations: Sequence[Tensor],
    select: Callable[[Any], Tensor],
    stop_at: Site | None = None,
) -> Tensor:
    """B, (N,): the score of the frozen model with the tensors of a site at zero."""
    zeros = tuple(torch.zeros_like(tensor) for tensor in activations)
    with torch.no_grad():
        if site is None:
            return select(frozen.replay(zeros, stop_at=stop_at))
        return select(frozen.replay(None, {site: zeros}, stop_at))


def image_sums(
    coefficients: Sequence[Tensor], activations: Sequence[Tensor], score: Tensor, *, multiplied: bool = False
) -> Tensor:
    """The sum of A·Y for each image, (N,).

    Layers keep the batch first, or merge it with other dimensions (windows, frames) batch-major.

    Args:
        coefficients: A; or A·Y, summed over channels or not.
        activations: Y.
        score: S, (N,).
        multiplied: Whether the first argument is A·Y.

    Returns:
        The sums, (N,).

    Raises:
        ValueError: If a tensor's first dimension is no multiple of the batch, so that images cannot be told apart.
    """
    count = score.shape[0]
    total = torch.zeros_like(score)
    for a, y in zip(coefficients, activations, strict=True):
        if count > 1 and y.shape[:1].numel() % count:
            raise ValueError(
                f"a layer's first dimension must be the batch of {count} images or a multiple, got {tuple(y.shape)}. "
                "Explain one image at a time."
            )
        total = total + (a if multiplied else a * y).reshape(count, -1).sum(1)
    return total


def bias_terms(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    target: Target = None,
    additional_forward_args: object = None,
    *,
    rules: Mapping[Any, Rule] | None = None,
) -> dict[str, Tensor]:
    """The share of every bias in B at the image.

    Each operation's constant part o (a convolution's bias, a norm's shift, the offset of a saturated unit or of a
    tangent, a class token, a position embedding) enters the score as A·o, with A the coefficients of the score in that
    operation's output. The sum of all is B at the image.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        inputs: The image, (N, C, H, W), or a tuple of such inputs.
        target: Label of each image, in any of Captum's forms.
        additional_forward_args: Further arguments; they are constants.
        rules: Operation to rule, to replace or add some.

    Returns:
        Name of the call (its module; the parameter's name where a token or an embedding is added) to its share, (N,),
        in logits.

    Raises:
        TypeError: As :func:`linear_form`.
        ValueError: As :func:`linear_form`.
        RuntimeError: As :func:`linear_form`.
        UnsupportedOperationError: As :func:`linear_form`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
        >>> image = torch.tensor([[1.0, -1.0]])
        >>> shares = bias_terms(model, image)
        >>> list(shares)
        ['0', '2']
        >>> bool(torch.allclose(sum(shares.values()), linear_form(model, image).bias))
        True
    """
    check_callable(forward_func)
    tensors = check_inputs(inputs)
    forward_func = unwrap_parallel(forward_func)
    recording = _OffsetRecording(forward_func, with_rules(rules), trusted=with_rules(None))
    with torch.enable_grad():
        output = recording.record(tensors, as_tuple_of_arguments(additional_forward_args), Reduction())
        warn_of_probabilities(recording, output)
        score = select_scores(output, target)
    names = list(recording.offsets)
    if not names or not score.requires_grad:
        return {}
    # one row per image: the derivative of its score in the scale of each offset
    images = torch.eye(len(score), dtype=score.dtype, device=score.device)
    rows = batched_gradients(score, [recording.offsets[name] for name in names], images)
    shares: dict[str, Tensor] = {}
    for name, row in zip(names, rows, strict=True):
        shares[name] = torch.zeros_like(score) if row is None else row.detach().to(score.dtype)
    return shares


@contextmanager
def quiet_batching() -> Iterator[None]:
    """No word of operations that batch one by one: that is no news to the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


def batched_gradients(
    outputs: Tensor, inputs: Sequence[Tensor], directions: Tensor, *, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients for several directions of the outputs at once, (directions, ...) each; None where there is none."""
    with quiet_batching():
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            outputs, inputs, directions, is_grads_batched=True, retain_graph=retain_graph, allow_unused=True
        )
    return found


class _OffsetRecording(Recording):
    """A recording in which every operation's constant part is scaled by 1 + t, with t = 0 a leaf of the graph."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.offsets: dict[str, Tensor] = {}
        self._parameter_names: dict[int, str] = {}
        super().__init__(*args, **kwargs)

    def name_modules(self, root: nn.Module) -> None:
        """Learn the names of parameters, too."""
        super().name_modules(root)
        for name, parameter in root.named_parameters():
            self._parameter_names.setdefault(parameter.untyped_storage().data_ptr(), name)

    def operate(self, key: str, name: str, rule: Rule, call: Call, run: Callable[[], Any]) -> Any:
        """The value, plus t times the operation's output at zero."""
        if isinstance(rule, Frozen):  # a constant to those that read it, whose offset it becomes
            return super().operate(key, name, rule, call, run)
        with torch.no_grad():
            offsets = self._at_zero(rule, call)
        output = super().operate(key, name, rule, call, run)
        if not any(bool(offset.any()) for offset in offsets):
            return output
        scale = self.offsets.setdefault(self._name_of(key, rule, call), offsets[0].new_zeros((), requires_grad=True))
        # setitem and its like return nothing: what they return is what they changed
        output = call.input if output is None else output
        values = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        # guarded as every operation is, so that a checkpoint in the model has nothing to recompute
        with self._snapshots.guard():
            return substituted(output, {id(v): v + scale * o for v, o in zip(values, offsets, strict=True)})

    def _at_zero(self, rule: Rule, call: Call) -> list[Tensor]:
        """The floating-point outputs of the frozen operation where every live argument is zero."""
        zeros: dict[int, Tensor] = {}
        for tensor in call.live:
            zeros[id(tensor)] = torch.zeros_like(tensor)
            self.tag(zeros[id(tensor)], self.tag_of(tensor))
        live = tuple(zeros[id(tensor)] for tensor in call.live)
        if call.in_place and not self.is_live(call.input):
            zeros[id(call.input)] = call.input.clone()
        args, kwargs = substituted(call.args, zeros), substituted(dict(call.kwargs), zeros)
        at_zero = replace(call, args=args, kwargs=kwargs, live=live)
        output = at_zero.run() if rule.is_affine(call) else rule.apply(at_zero, rule.freeze(call))
        output = at_zero.input if output is None else output
        return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]

    def _name_of(self, key: str, rule: Rule, call: Call) -> str:
        """The call's name, or that of the parameter it adds or puts beside live tensors: a token, an embedding."""
        if getattr(rule, "keeps_gates", False):
            for tensor in tensors_in((call.args, call.kwargs)):
                name = self._parameter_names.get(tensor.untyped_storage().data_ptr())
                if name is not None and not self.is_live(tensor):
                    return name
        return key


def check_sites(recording: Recording, sites: Mapping[Site, Any], below: Site | None = None) -> None:
    """Raise for layers that did not run or have nothing to explain; warn of those that ran more than once.

    Raises:
        ValueError: If so.
    """
    for site in sites:
        layer, at_input = site
        name, calls = type(layer).__name__, recording.calls[layer]
        if site not in recording.tapped and below is not None:
            raise ValueError(
                f"to_layer must lie below the neuron's layer, got a {name} that runs later or never. Name a layer "
                "between the input and the neuron."
            )
        if site not in recording.tapped:
            raise ValueError(
                f"layer must run when the model does, got a {name} that never ran. Name a layer on the way to "
                "the score."
            )
        if not recording.tapped[site].anchors:
            side = "input" if at_input else "output"
            raise ValueError(f"layer must have a floating-point {side}, got none at this {name}. Name another layer.")
        if calls > 1:
            warnings.warn(
                f"a {name} runs {calls} times; its map is that of its last call, and what the calls before it add to "
                "the score is part of B.",
                stacklevel=4,
            )


def warn_of_probabilities(recording: Recording, output: Any) -> None:
    """Warn if the model ends in a softmax or sigmoid."""
    if isinstance(output, Tensor) and recording.tag_of(output) & Tag.PROBABILITY:
        warnings.warn(
            "the model ends in a softmax or sigmoid, so the score that is explained is a probability, by its tangent. "
            "Explain the logits: leave the last operation out.",
            stacklevel=4,
        )


def select_scores(output: Any, target: Target) -> Tensor:
    """The scores (N,) that a target selects from a model's output.

    Args:
        output: (N,), or (N, ...).
        target: None if there is one score for each image; an int, a one-element tensor or a tuple of indices for all
            images; a list or tensor of N ints, or a list of N tuples, one for each.

    Returns:
        The scores, (N,).

    Raises:
        TypeError: If the output is no floating-point tensor, or the target has no known form.
        ValueError: If the target is missing, out of range or of the wrong length.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"the model must return a floating-point tensor of scores, (N, ...), got {got}. Wrap it in a function that "
            "picks one: lambda x: model(x)['out']."
        )
    if output.dim() == 0:
        raise ValueError("the model must return a score for each image, (N, ...), got a single number.")
    count, sizes = output.shape[0], tuple(output.shape[1:])
    if target is None:
        if output[0].numel() != 1:
            raise ValueError(
                f"target must be given for a model that returns {tuple(output.shape)}, got None. Name a label."
            )
        return output.reshape(count)
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex():
            raise TypeError(f"target must hold integers, got {target.dtype}.")
        target = int(target) if target.numel() == 1 else target.tolist()
    if isinstance(target, bool) or not isinstance(target, (int, tuple, list)):
        raise TypeError(f"target must be an int, a tuple, a list or a tensor of integers, got {type(target).__name__}.")
    if isinstance(target, list):
        if len(target) != count:
            raise ValueError(f"target must have one entry for each of the {count} images, got {len(target)}.")
        rows = [_index(entry, sizes) for entry in target]
        columns = [torch.tensor([row[axis] for row in rows], device=output.device) for axis in range(len(sizes))]
        place: tuple[Any, ...] = (torch.arange(count, device=output.device), *columns)
    else:
        place = (slice(None), *_index(target, sizes))
    return output[place]


def _index(entry: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """One target as an index into an image's scores.

    Returns:
        The index.

    Raises:
        TypeError: If it holds something else than integers.
        ValueError: If it has too many or too few entries or is out of range.
    """
    index = tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in index):
        raise TypeError(f"target must hold integers, got {entry!r}.")
    if len(index) != len(sizes):
        raise ValueError(
            f"target must have {len(sizes)} ind{'ex' if len(sizes) == 1 else 'ices'} for scores of shape (N, "
            f"{', '.join(map(str, sizes))}), got {entry!r}."
        )
    for i, size in zip(index, sizes, strict=True):
        if not -size <= i < size:
            raise ValueError(f"target must be from 0 to {size - 1}, got {i}.")
    return index
