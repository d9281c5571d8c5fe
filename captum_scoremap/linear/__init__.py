"""S = A·Y + B, Eq. (3) of Yu et al. 2015, read off the tape: forms, bias terms, all labels, and how exact it is."""

from .all_labels import explain_targets
from .bias_terms import bias_terms
from .exactness import Exactness, LayerExactness, check_exactness
from .explanation import Explanation, check_sites, explain, warn_of_probabilities
from .form import LinearForm, linear_form
from .reduction import Reduction, image_sums
from .target import Label, Target, select_scores

__all__ = [
    "Exactness",
    "Explanation",
    "Label",
    "LayerExactness",
    "LinearForm",
    "Reduction",
    "Target",
    "bias_terms",
    "check_exactness",
    "check_sites",
    "explain",
    "explain_targets",
    "image_sums",
    "linear_form",
    "select_scores",
    "warn_of_probabilities",
]
