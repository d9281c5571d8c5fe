"""What a tape reads of the model, which may change after the run: weights, and whatever else lives on outside it."""

from torch import Tensor
from torch.utils._pytree import tree_leaves

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
            id(leaf): leaf
            for step in tape.steps
            for leaf in tree_leaves((step.args, dict(step.kwargs), step.frozen()))
            if isinstance(leaf, Tensor) and not leaf.is_inference()  # these count no changes
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
