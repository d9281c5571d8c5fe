"""One rule per operation: the exact linear form of each at the image.

``DEFAULT`` is the table a model runs under, ``TANGENT`` the plain local linearization (then A is the ordinary
gradient). Operations go by the name PyTorch gives them, without the underscores of in-place and operator forms:
``relu`` stands for ``torch.relu``, ``F.relu``, ``x.relu_()`` and ``nn.ReLU`` alike.
"""

from .activations import Breaks, Gate, Pieces, Select
from .attention import MultiHeadAttention, ScaledDotProductAttention
from .normalization import ScaleOnly, Standardize
from .pooling import Extremum, MaxPool
from .products import Division, Power, Product
from .rule import Call, Comparison, Composite, FirstOnly, Frozen, Linear, Rule, Tangent, substituted, tensors_in
from .table import DEFAULT, METADATA, TANGENT, operation_name, with_rules

__all__ = [
    "DEFAULT",
    "METADATA",
    "TANGENT",
    "Breaks",
    "Call",
    "Comparison",
    "Composite",
    "Division",
    "Extremum",
    "FirstOnly",
    "Frozen",
    "Gate",
    "Linear",
    "MaxPool",
    "MultiHeadAttention",
    "Pieces",
    "Power",
    "Product",
    "Rule",
    "ScaleOnly",
    "ScaledDotProductAttention",
    "Select",
    "Standardize",
    "Tangent",
    "operation_name",
    "substituted",
    "tensors_in",
    "with_rules",
]
