"""A copy of a model, whatever its modules hold."""

import copy
from typing import TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["copied"]

Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module) -> Module:
    """Return a deep copy of a model, of which later runs of either say nothing to the other.

    Modules may hold tensors of an earlier run with its graph, as those do that keep their features, and such as
    ``torch.nn.utils.weight_norm`` makes. PyTorch copies none of these; here they are copied without their graph.

    Args:
        model: The model; it is not touched.

    Returns:
        The copy.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> model.seen = model(torch.ones(1, 2))
        >>> bool((copied(model).seen == model.seen).all())
        True
    """
    computed = {
        id(leaf): leaf.detach().clone()
        for module in model.modules()
        for leaf in tree_leaves(list(vars(module).values()))
        if isinstance(leaf, Tensor) and not leaf.is_leaf
    }
    return copy.deepcopy(model, dict(computed))
