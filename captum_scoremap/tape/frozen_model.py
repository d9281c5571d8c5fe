"""The frozen model: the network as an affine function, exact at one image and in its whole linear region."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_scoremap.checks import as_tuple, as_tuple_of_arguments, check_callable, check_inputs, unwrap_parallel
from captum_scoremap.rules import Rule, Value, display_name, with_rules

from .boundary import Boundary, nearest_boundary
from .module_tracker import root_module
from .recording import Recording
from .steps import Step, Tape

__all__ = ["FrozenModel", "freeze"]

_SAME_MODEL = "other must be the same model, frozen at an input of the same shape"


class FrozenModel:
    """A model with everything nonlinear in it frozen at an image; made by :func:`freeze`.

    Called with any input of the image's shape it returns the model's output under the frozen masks, switches, gates and
    scales: an affine function, equal to the model's at the image (Eq. (2) of Yu et al. 2015 with R fixed). Noise that
    the model drew is frozen, too.

    Args:
        recording: The run at the image.
        inputs: The image.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> image = torch.rand(1, 2)
        >>> frozen = freeze(model, image)
        >>> bool(torch.allclose(frozen(image), model(image))), frozen.switches["1"].shape
        (True, torch.Size([1, 3]))
        >>> frozen.same_region(freeze(model, image + 1e-9))
        True
    """

    def __init__(self, recording: Recording, inputs: tuple[Tensor, ...]) -> None:
        self._tape: Tape = recording.tape
        self._tape.copy_inference_tensors()
        self._check_constants = recording.tape.check_of_constants("the frozen model", "Freeze the model again.")
        self._inputs = inputs
        self._function = recording.forward_func
        self._ran = frozenset(recording.modules.calls)
        self._layers = {site[0]: tapped for site, tapped in recording.tapped.items() if site is not None}
        self._names: dict[Step, str] = {}
        numbers: Counter[str] = Counter()
        for step in self._tape.steps:
            if step.rule.switch(step.frozen()) is not None:
                name = recording.modules.call_name(step.module, display_name(step.operation))
                numbers[name] += 1
                self._names[step] = name if numbers[name] == 1 else f"{name}#{numbers[name]}"

    def __call__(
        self,
        inputs: Tensor | Sequence[Tensor],
        outputs: Mapping[nn.Module, Tensor | Sequence[Tensor]] | None = None,
    ) -> Any:
        """Return the frozen model's output.

        Args:
            inputs: Tensor or tuple of tensors, shaped like those it was frozen at.
            outputs: Tensors to go on with in place of the outputs of some layers (their last call). With zeros the
                result is that layer's B of Eq. (3).

        Returns:
            What the model returns: scores (N, K), or whatever it is.

        Raises:
            TypeError: If ``outputs`` is no mapping (several inputs are one tuple), or something given is no tensor.
            ValueError: If a shape, type or device is not the recorded one, a layer returned another number of tensors,
                or did not run.
            RuntimeError: If the model's weights changed in place since it was frozen.
        """
        if outputs is not None and not isinstance(outputs, Mapping):
            raise TypeError(
                f"outputs must map layers to tensors, got {type(outputs).__name__}. Pass several inputs as one tuple."
            )
        self._check_constants()
        known: dict[Value, Tensor] = {}
        for layer, value in () if outputs is None else outputs.items():
            if layer not in self._ran or layer not in self._layers:
                raise ValueError(f"outputs must name layers that ran, got a {type(layer).__name__} that did not.")
            known.update(zip(self._layers[layer].values, self._outputs(layer, value), strict=True))
        given = self._shaped(inputs, "inputs must be shaped like those the model was frozen at")
        known.update((place, tensor) for place, tensor in zip(self._tape.inputs, given, strict=True) if place)
        return self._tape.output_at(known)

    def _shaped(self, tensors: Tensor | Sequence[Tensor], wanted: str) -> tuple[Tensor, ...]:
        """Return tensors as a tuple, which must be shaped like the inputs."""
        return _like(self._inputs, as_tuple(tensors), wanted)

    def _outputs(self, layer: nn.Module, value: object) -> tuple[Tensor, ...]:
        """Return the tensors given for a layer's outputs as a tuple, which must be shaped like those."""
        given = (value,) if value is None else as_tuple(value)
        wanted = f"outputs must hold tensors shaped like those that the {type(layer).__name__} returned"
        return _like(self._layers[layer].values, given, wanted)

    def __reduce__(self) -> Any:
        """Refuse to be pickled."""
        raise TypeError(
            "a frozen model must stay in its process: it holds the operations of a run, got a request to pickle it. "
            "Freeze the model again where it is needed, or pickle what linear_form returns."
        )

    def __copy__(self) -> "FrozenModel":
        return self  # nothing of it ever changes

    def __deepcopy__(self, _: Any) -> "FrozenModel":
        return self

    @property
    def switches(self) -> dict[str, Tensor]:
        """Masks (bool, or the index of the piece) and pooling switches (flat positions), by the name of the call.

        A call is named after its module, and its operation where the module does more than that one; a running number
        follows where it happens again: ``features.1``, ``layer1.0.relu#2``, ``block:max_pool2d``.
        """
        return {name: step.rule.switch(step.frozen()) for step, name in self._names.items()}  # type: ignore[misc]

    def flipped(self, other: "FrozenModel") -> dict[str, int]:
        """Return which switches differ from another frozen model's, and in how many places.

        Args:
            other: The same model, frozen at another image.

        Returns:
            Name of the switch to the number of places; empty in the same linear region.

        Raises:
            TypeError: If the other is no frozen model.
            ValueError: If the two are not frozen from the same model at inputs of one shape, or it took another branch.
        """
        counts = self._flipped(other)
        if counts is None:
            raise ValueError(f"{_SAME_MODEL}; got one that took another branch there.")
        return counts

    def same_region(self, other: "FrozenModel") -> bool:
        """Return whether the two images lie in the same linear region: all masks, switches and branches agree."""
        return self._flipped(other) == {}

    def _flipped(self, other: "FrozenModel") -> dict[str, int] | None:
        """Return how many places of each switch differ; None where the same model took another branch."""
        if not isinstance(other, FrozenModel):
            raise TypeError(
                f"other must be a frozen model, got {type(other).__name__}. Freeze the model at the other input."
            )
        mine, others = self.switches, other.switches
        if _shapes(mine) == _shapes(others):
            counts = {name: int((mine[name] != others[name]).sum()) for name in mine}
            return {name: count for name, count in counts.items() if count}
        shapes = [[tensor.shape for tensor in one._inputs] for one in (self, other)]
        if self._function == other._function and shapes[0] == shapes[1]:
            return None
        raise ValueError(f"{_SAME_MODEL}; got different switches.")

    def distance_to_boundary(self, direction: Tensor | Sequence[Tensor]) -> Boundary:
        """Return the first step along ``direction`` at which a switch flips.

        Exact for piecewise-linear models; for others it is that of the frozen model, a first-order estimate. Where what
        switches cannot be followed (``mode``, ``topk`` without ``sorted``, rounding, the median of a whole tensor, a
        rule of your own without ``steps_to_boundary``), a warning names it, and the region may end before.

        Args:
            direction: Change of the input per unit step, shaped like it, finite.

        Returns:
            The distance for each image, and the name of the switch that flips.

        Raises:
            TypeError: If the direction is no tensor, or a tuple of such for several inputs.
            ValueError: If the direction's shape is not that of the input, or a number of it is NaN or infinite.
            RuntimeError: If the model's weights changed in place since it was frozen.
        """
        self._check_constants()
        directions = self._shaped(direction, "direction must be shaped like the inputs")
        if unlimited := sum(int((~one.isfinite()).sum()) for one in directions):
            raise ValueError(
                f"direction must be finite, got {unlimited} values that are NaN or infinite. Replace them first."
            )
        with torch.no_grad():
            return nearest_boundary(self._tape, self._names, self._inputs, directions)


def _shapes(switches: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: switch.shape for name, switch in switches.items()}


def _like(those: Sequence[Tensor | Value], given: tuple[Any, ...], wanted: str) -> tuple[Tensor, ...]:
    """Return what is given, which must be tensors of the shapes, types and devices of those."""
    for one in given:
        if not isinstance(one, Tensor):
            raise TypeError(f"{wanted}, got {type(one).__name__}. Pass tensors; several as one tuple.")
    shapes, expected = ([tuple(one.shape) for one in some] for some in (given, those))
    if shapes != expected:
        raise ValueError(f"{wanted}, {expected}; got {shapes}.")
    kinds, wanted_kinds = ([f"{one.dtype} on {one.device}" for one in some] for some in (given, those))
    if kinds != wanted_kinds:
        raise ValueError(f"{wanted}, of {', '.join(wanted_kinds)}; got {', '.join(kinds)}. Convert them first.")
    return given


def freeze(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    additional_forward_args: object = None,
    *,
    rules: Mapping[Any, Rule] | None = None,
) -> FrozenModel:
    """Freeze everything nonlinear in a model at an image.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        inputs: The image, (N, C, H, W), or a tuple of such inputs.
        additional_forward_args: Additional arguments; they are constants.
        rules: Operation to rule, to replace or add some.

    Returns:
        The frozen model. It shares the model's parameters: after they changed it refuses to run.

    Raises:
        TypeError: If the model is compiled or scripted, or an input is not floating point.
        ValueError: If an input is unbatched, empty or not finite, or the model is in training mode.
        RuntimeError: If ``torch.inference_mode`` is on.
        UnsupportedOperationError: If operations have no rule; all are listed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
        >>> image = torch.tensor([[1.0, -1.0]])
        >>> frozen = freeze(model, image)
        >>> bool(torch.allclose(frozen(image), model(image)))
        True
        >>> list(frozen.switches)
        ['1']
        >>> bias = frozen(torch.zeros(1, 2))
        >>> bool(torch.allclose(frozen(2 * image) - bias, 2 * (frozen(image) - bias)))
        True
    """
    check_callable(forward_func)
    tensors = check_inputs(inputs)
    forward_func = unwrap_parallel(forward_func)
    root = root_module(forward_func)
    modules = () if root is None else root.modules()
    layers = [(module, False) for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    recording = Recording(forward_func, with_rules(rules), layers, inspect=True)
    recording.record(tensors, as_tuple_of_arguments(additional_forward_args))
    return FrozenModel(recording, tuple(tensor.detach().clone() for tensor in tensors))
