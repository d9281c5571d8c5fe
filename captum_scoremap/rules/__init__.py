"""One rule per operation: the exact linear form of each at the image.

``DEFAULT`` is the table a model runs under, ``TANGENT`` the plain local linearization (then A is the ordinary
gradient). Operations are those of ATen, the few hundred that all of PyTorch comes down to; in-place forms and ``out=``
share the rule of the plain one: ``relu`` stands for ``torch.relu``, ``F.relu``, ``x.relu_()`` and ``nn.ReLU`` alike.
"""

from .activations import Breakpoints, Choice, Clamp, Gate, PiecewiseLinear, Power
from .attention import Attention
from .call import Call, Value, floating, substituted, tensors_in
from .moving import Copy
from .normalization import BatchNorm, GroupNorm, LayerNorm
from .pooling import Extremum, MaxPool
from .products import Division, Product
from .quantized import Rounded
from .rule import Comparison, Composite, Frozen, Linear, Rule
from .table import DEFAULT, TANGENT, display_name, with_rules
from .tangent import FirstLinear, Tangent

__all__ = [
    "DEFAULT",
    "TANGENT",
    "Attention",
    "BatchNorm",
    "Breakpoints",
    "Call",
    "Choice",
    "Clamp",
    "Comparison",
    "Composite",
    "Copy",
    "Division",
    "Extremum",
    "FirstLinear",
    "Frozen",
    "Gate",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "MaxPool",
    "PiecewiseLinear",
    "Power",
    "Product",
    "Rounded",
    "Rule",
    "Tangent",
    "Value",
    "display_name",
    "floating",
    "substituted",
    "tensors_in",
    "with_rules",
]
