"""What a tape reads of the model, which may change after the run: weights, and whatever else lives on outside it.

What is computed of a tape after they changed, as in a step of training, would be neither of the model as it was nor of
the one that is.
"""

from collections.abc import Callable

from captum_scoremap.rules import tensors_in

from .steps import Tape

__all__ = ["check_of_constants"]


def check_of_constants(tape: Tape, what: str, advice: str) -> Callable[[], None]:
    """Return a check that raises if a tensor that the steps read besides values was changed in place since then."""
    read = {
        id(tensor): tensor
        for step in tape.steps
        for tensor in tensors_in((step.args, step.kwargs, step.held()))
        if not tensor.is_inference()  # these count no changes
    }
    versions = [(tensor, tensor._version) for tensor in read.values()]

    def check() -> None:
        changed = [tuple(tensor.shape) for tensor, version in versions if tensor._version != version]
        if changed:
            raise RuntimeError(
                f"the model's weights must be as they were when {what} was made, got {len(changed)} tensors changed "
                f"since, the first of shape {changed[0]}. {advice}"
            )

    return check
