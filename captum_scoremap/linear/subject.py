"""What a user's call is about, and its run, with which everything here starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_scoremap.checks import InvalidValueError, as_tuple_of_arguments, unwrap_parallel, warn
from captum_scoremap.rules import Rule, display_name, with_rules
from captum_scoremap.scores import Target, is_function, logits_in, select_scores
from captum_scoremap.tape import Recording, Route, Site

__all__ = ["Subject", "scores_of", "warn_of_probabilities"]

_PROBABILITIES = {"softmax", "log_softmax", "sigmoid", "logsigmoid"}


@dataclass(frozen=True)
class Subject:
    """What is explained: a model, or a function that calls it, at an image, under rules.

    Attributes:
        forward_func: The model, or the function.
        inputs: The image.
        additional_forward_args: Constants.
        rules: Operation to rule.
        on_route: Told which modules ran as soon as the model has run; what it raises ends the run.
    """

    forward_func: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    additional_forward_args: object = None
    rules: Mapping[Any, Rule] | None = None
    on_route: Callable[[Route], None] | None = None

    def record(
        self,
        select: Callable[[Any], Any],
        sites: Sequence[Site | None] = (),
        *,
        keep_bypass: bool = False,
        stop_at: Site | None = None,
        create_graph: bool = False,
    ) -> tuple[Recording, Any]:
        """Run the model, and record that up to what ``select``, which is part of it, makes of the output.

        With ``keep_bypass``, what bypasses the sites (None is the input) is kept, so that B can be taken there; the run
        ends after ``stop_at``; ``create_graph`` is for results that can be differentiated.

        Returns:
            The run, and what was selected.

        Raises:
            RuntimeError: If ``create_graph`` meets tensors made under ``torch.inference_mode``.
        """
        taps = [site for site in sites if site is not None]
        forward_func, rules = unwrap_parallel(self.forward_func), with_rules(self.rules)
        recording = Recording(
            forward_func, rules, taps, keep_bypass=keep_bypass, stop_at=stop_at, differentiable=create_graph
        )

        def checked(output: Any) -> Any:
            if self.on_route is not None:
                self.on_route(recording.modules.route())
            if stop_at is not None and not recording.modules.calls[stop_at[0]]:
                raise InvalidValueError(
                    f"layer must run when the model does, got a {type(stop_at[0]).__name__} that never ran."
                )
            _check_sites(recording, taps, stop_at)
            if stop_at is None:
                warn_of_probabilities(recording, output)
            return select(output)

        try:
            found = recording.record(self.inputs, as_tuple_of_arguments(self.additional_forward_args), checked)
        except RuntimeError as error:
            if not create_graph or "Inference tensors" not in str(error):
                raise
            raise RuntimeError(
                "with create_graph the model's tensors must be such as autograd can save, got some made under "
                "torch.inference_mode. Explain a copy made outside of it: copy.deepcopy(model)."
            ) from error
        return recording, found


def scores_of(target: Target, images: int, *, of_layer: bool = False) -> Callable[[Any], Tensor]:
    """Return the function from a model's output to the scores, (N,), that a target names; or from a layer's value."""

    def select(output: Any) -> Tensor:
        scores: Tensor = target(output) if of_layer and is_function(target) else select_scores(output, target, images)
        if scores.dim() == 0:  # one number for the whole batch
            return scores.reshape(1)
        if len(scores) != images:
            raise ValueError(
                f"the model must return one row of scores for each image, got {len(scores)} for {images}. Select one "
                f"with a function as target: lambda out: out.reshape({images}, -1, *out.shape[1:])[:, row, label]."
            )
        return scores

    return select


def _check_sites(recording: Recording, sites: Sequence[Site], below: Site | None = None) -> None:
    """Raise for layers that did not run or have nothing to explain; warn of those that ran more than once."""
    for site in sites:
        layer, at_input = site
        name, calls = type(layer).__name__, recording.modules.calls[layer]
        if site not in recording.tapped and below is not None:
            raise ValueError(
                f"to_layer must lie below the neuron's layer, got a {name} that runs later or never. Name a layer "
                "between the input and the neuron."
            )
        if site not in recording.tapped and calls:
            raise InvalidValueError(
                f"layer must run outside of torch.vmap, got a {name} inside of one. Name a layer around it."
            )
        if site not in recording.tapped:
            raise InvalidValueError(
                f"layer must run when the model does, got a {name} that never ran. Name a layer on the way to "
                "the score."
            )
        if not recording.tapped[site].values:
            side = "input" if at_input else "output"
            raise ValueError(f"layer must have a floating-point {side}, got none at this {name}. Name another layer.")
        if calls > 1:
            warn(
                f"a {name} runs {calls} times; its map is that of its last call, and what the calls before it add to "
                "the score is part of B."
            )


def warn_of_probabilities(recording: Recording, output: Any) -> None:
    """Warn if the model ends in a softmax or sigmoid."""
    scores = logits_in(output)
    value = recording.value_of(scores) if isinstance(scores, Tensor) else None
    step = recording.tape.steps[value.step] if value is not None and value.step >= 0 else None
    if step is not None and display_name(step.operation) in _PROBABILITIES:
        warn(
            "the model ends in a softmax or sigmoid, so the score that is explained is a probability, by its tangent. "
            "Explain the logits: leave the last operation out."
        )
