"""Record a model once, as a list of affine steps; everything else is algebra on that list."""

from .boundary import Boundary
from .constants import Constants
from .frozen_model import FrozenModel, as_tuple_of_arguments, freeze
from .places import Site, root_module
from .run import Recording, Tapped
from .sight import exits_refused
from .steps import Step, Tape, check_finite, told_by_image

__all__ = [
    "Boundary",
    "Constants",
    "FrozenModel",
    "Recording",
    "Site",
    "Step",
    "Tape",
    "Tapped",
    "as_tuple_of_arguments",
    "check_finite",
    "exits_refused",
    "freeze",
    "root_module",
    "told_by_image",
]
