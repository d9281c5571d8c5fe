"""What every attribution class here promises Captum, or refuses with an error."""

from collections.abc import Callable, Mapping
from typing import Any

from captum._utils.gradient import compute_gradients
from captum.attr import GradientAttribution
from torch import Tensor

from captum_scoremap.checks import InvalidValueError, as_tuple, check_callable, check_inputs
from captum_scoremap.linear import Reduction, Subject, explain
from captum_scoremap.rules import Rule
from captum_scoremap.scores import Target
from captum_scoremap.tape import Site

__all__ = ["Contract"]


class Contract(GradientAttribution):
    """The base of all attribution classes here.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        rules: Operation to rule, to replace or add some.
        multiply_by_inputs: Whether the sub-scores A·Y are returned, or the coefficients A; None for neither.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        rules: Mapping[Any, Rule] | None = None,
        multiply_by_inputs: bool | None = None,
    ) -> None:
        check_callable(forward_func)
        super().__init__(forward_func)
        self._rules = rules
        self._multiply_by_inputs = multiply_by_inputs

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether coefficients are multiplied by what they belong to."""
        return bool(self._multiply_by_inputs)

    def has_convergence_delta(self) -> bool:
        """Return whether the map is one of A and Y: S = A·Y + B is exact, and the delta checks it."""
        return self._multiply_by_inputs is not None

    @property
    def gradient_func(self) -> Callable[..., Any]:
        """Captum's own: coefficients are read off the recorded run, and nothing else would be called."""
        return compute_gradients

    @gradient_func.setter
    def gradient_func(self, function: Callable[..., Any]) -> None:
        if function is not compute_gradients:
            raise ValueError(
                "gradient_func must be left as it is: coefficients are read off the record of the run, not taken by "
                "it. Use rules= to say what an operation passes on."
            )

    def _subject(self, inputs: tuple[Tensor, ...], additional_forward_args: object) -> Subject:
        """Return what is explained: the model at inputs that were checked."""
        return Subject(self.forward_func, inputs, additional_forward_args, self._rules)

    def _delta(
        self,
        site: Site | None,
        attributions: Tensor | tuple[Tensor, ...],
        start_point: object,
        end_point: Tensor | tuple[Tensor, ...],
        target: Target,
        additional_forward_args: object,
    ) -> Tensor:
        """Return S - (sum of the attributions + B) for attributions that a method computed before at a site, (N,)."""
        if not self.multiplies_by_inputs:
            raise ValueError(
                "compute_convergence_delta needs A·Y, got a method of coefficients. Use multiply_by_inputs=True."
            )
        if any(bool(one.any()) if isinstance(one, Tensor) else bool(one) for one in as_tuple(start_point)):
            raise ValueError(
                "start_point must be None or zero: S = A·Y + B is exact at the image, with B the frozen model at zero."
            )
        subject = self._subject(check_inputs(end_point, indices=site is not None), additional_forward_args)
        found = explain(subject, target, [site], Reduction(multiply=False), keep=True)
        given = tuple(one for one in as_tuple(attributions) if isinstance(one, Tensor))
        shapes, expected = [tuple(one.shape) for one in given], [tuple(y.shape) for y in found.tapped(site).activations]
        if len(shapes) != len(expected) or not all(map(_is_shape_or_sum, shapes, expected)):
            raise InvalidValueError(f"attributions must be shaped like what they explain, {expected}, got {shapes}.")
        return found.score - found.sums_of(given, site) - found.bias(site)

    def attribute_future(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, as most of Captum's methods do."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}. Use attribute.")

    def compute_convergence_delta(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse Captum's delta, which measures against the model at a start point rather than against B."""
        raise NotImplementedError(
            f"compute_convergence_delta is not implemented for {type(self).__name__}, whose maps are not differences "
            "between two inputs."
        )


def _is_shape_or_sum(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Return whether a shape is that of the whole, or of its sum over one dimension, which is not the first."""
    summed = [axis for axis, (one, other) in enumerate(zip(shape, whole, strict=False)) if one != other]
    return len(shape) == len(whole) and (not summed or (len(summed) == 1 and summed[0] > 0 and shape[summed[0]] == 1))
