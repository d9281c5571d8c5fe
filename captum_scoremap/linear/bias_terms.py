"""Where B comes from: the share of every operation's constant part in the score."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.checks import check_callable, check_inputs
from captum_scoremap.rules import Rule, Value, display_name, tensors_in
from captum_scoremap.scores import Target
from captum_scoremap.tape import Recording, Step

from .batching import over_rows
from .subject import Subject, scores_of

__all__ = ["bias_terms", "constant_times", "names_of_steps", "shares_of_constants"]


def bias_terms(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    target: Target = None,
    additional_forward_args: object = None,
    *,
    rules: Mapping[Any, Rule] | None = None,
) -> dict[str, Tensor]:
    """Return the share of every bias in B at the image.

    Each operation's constant part o (a convolution's bias, a norm's shift, the offset of a saturated unit or of a
    tangent, a class token, a position embedding) enters the score as A·o, with A the coefficients of the score in that
    operation's output. The sum of all is B at the image. The errors are those of :func:`linear_form`.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it.
        inputs: The image, (N, C, H, W), or a tuple of such inputs.
        target: Label of each image, in any of Captum's forms, or a function from the model's output to (N,).
        additional_forward_args: Additional arguments; they are constants.
        rules: Operation to rule, to replace or add some.

    Returns:
        Name of the call (its module; the parameter's name where a token or an embedding is added) to its share, (N,),
        in logits.

    Example:
        >>> import torch
        >>> from captum_scoremap import linear_form
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
    subject = Subject(forward_func, tensors, additional_forward_args, rules)
    recording, score = subject.record(scores_of(target, len(tensors[0])))
    with torch.no_grad():
        return shares_of_constants(recording, score)


def shares_of_constants(recording: Recording, score: Tensor) -> dict[str, Tensor]:
    """Return A·o for every step's constant part o, by name and in the order of the steps, (N,) each."""
    tape = recording.tape
    if tape.value_of_output() is None:  # the score does not depend on the image
        return {"score": score}
    wanted: dict[Value, Callable[[Tensor], Tensor]] = {}
    for step in tape.steps:
        pairs = zip(step.outputs, step.constants(), strict=False)
        wanted |= {value: partial(_product, one) for value, one in pairs if one is not None and bool(one.any())}
    # one row for each image: to whom a step's coefficients belong is known only that way
    rows = torch.eye(len(score), dtype=score.dtype, device=score.device)
    found = over_rows(lambda row: tape.transposed(tape.seeds(row), wanted), rows)
    name_of = names_of_steps(recording)
    shares: dict[str, Tensor] = {}
    for value in wanted:
        if value in found:
            name, share = name_of(tape.steps[value.step]), found[value].to(score.dtype)
            shares[name] = shares[name] + share if name in shares else share
    return shares


def constant_times(constant: Tensor, coefficients: Tensor) -> Tensor:
    """Return A·o, which is real; o is infinite where a mask, for which A is zero, makes it so."""
    if coefficients.is_complex():
        return constant_times(
            torch.view_as_real(constant.to(coefficients.dtype).resolve_conj()),
            torch.view_as_real(coefficients.resolve_conj()),
        ).sum(-1)
    return torch.where(coefficients == 0, 0, coefficients * constant)


def _product(constant: Tensor, coefficients: Tensor) -> Tensor:
    return constant_times(constant, coefficients).sum()


def names_of_steps(recording: Recording) -> Callable[[Step], str]:
    """Return the name of a step's constant part: its module, or the parameter (a token, an embedding) that it adds."""
    modules = recording.modules
    parameters = {
        parameter.untyped_storage()._cdata: name
        for root in modules.roots
        for name, parameter in root.named_parameters()
    }

    def name_of(step: Step) -> str:
        if step.rule.keeps_gates:
            for tensor in tensors_in((step.args, step.kwargs)):
                name = parameters.get(tensor.untyped_storage()._cdata)
                if name is not None:
                    return (name.rpartition(".")[0] or name) if name.endswith("bias") else name
        return modules.call_name(step.module, display_name(step.operation))

    return name_of
