"""What a tape reads of the model, which may change after the run: weights, and whatever else lives on outside it."""

from captum_scoremap.rules import tensors_in

from .steps import Tape

__all__ = ["Constants"]


class Constants:
    """The tensors that the steps of a tape read besides values, and how often each had been changed by then.

    A tape shares the model's weights. What is computed of it after they changed, as in a step of training, would be
    neither of the model as it was nor of the one that is.

    Args:
        tape: The tape, after the run.
    """

    def __init__(self, tape: Tape) -> None:
        read = {
            id(tensor): tensor
            for step in tape.steps
            for tensor in tensors_in((step.args, step.kwargs, step.held()))
            if not tensor.is_inference()  # these count no changes
        }
        self._versions = [(tensor, tensor._version) for tensor in read.values()]

    def check(self, what: str, advice: str) -> None:
        """Raise if one of them was changed in place.

        Args:
            what: What was made of the tape.
            advice: What to do.

        Raises:
            RuntimeError: If so.
        """
        changed = [tuple(tensor.shape) for tensor, version in self._versions if tensor._version != version]
        if changed:
            raise RuntimeError(
                f"the model's weights must be as they were when {what} was made, got {len(changed)} tensors changed "
                f"since, the first of shape {changed[0]}. {advice}"
            )
