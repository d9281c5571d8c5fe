"""S = A·Y + B, Eq. (3) of Yu et al. 2015, read off the tape: forms, bias terms, all labels, and how exact it is."""

from .all_labels import explain_targets
from .bias_maps import BiasMaps, bias_maps
from .bias_terms import bias_terms
from .exactness import Exactness, LayerExactness, check_exactness
from .explanation import explain
from .form import LinearForm, LinearForms, linear_form
from .ledger import Ledger, explain_completely, ledgers
from .main_layers import main_layers, main_modules
from .outputs import layer_shapes
from .reduction import Reduction
from .subject import Subject

__all__ = [
    "BiasMaps",
    "Exactness",
    "LayerExactness",
    "Ledger",
    "LinearForm",
    "LinearForms",
    "Reduction",
    "Subject",
    "bias_maps",
    "bias_terms",
    "check_exactness",
    "explain",
    "explain_completely",
    "explain_targets",
    "layer_shapes",
    "ledgers",
    "linear_form",
    "main_layers",
    "main_modules",
]
