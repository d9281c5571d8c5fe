"""Run a model with everything nonlinear frozen at the image: record it there, replay it anywhere."""

from .boundary import Boundary
from .frozen_model import FrozenModel, as_tuple_of_arguments, freeze
from .recording import Recording, Tapped
from .run import Site, Tag
from .tail import Tail
from .taps import Reduction

__all__ = [
    "Boundary",
    "FrozenModel",
    "Recording",
    "Reduction",
    "Site",
    "Tag",
    "Tail",
    "Tapped",
    "as_tuple_of_arguments",
    "freeze",
]
