"""Record a model once, as a list of affine steps; everything else is algebra on that list.

To read it: ``steps`` has the list and the two ways to walk it; ``recording`` writes it. Every operation arrives there,
is looked up (``operation``), and becomes a step (``writing``) if a tensor that it reads is live (``run``). Beside that
stand what changes memory (``changes``, on ``memory``), what rounds (``quantized``), where layers begin (``taps``,
``places``), and what nobody saw (``sight``, ``exits``).
"""

from .boundary import Boundary
from .exits import exits_refused
from .frozen_model import FrozenModel, freeze
from .places import Site, root_module
from .recording import Recording
from .sight import collector_at_rest
from .steps import Step, Tape, Tapped, check_finite, sites_of, told_by_image

__all__ = [
    "Boundary",
    "FrozenModel",
    "Recording",
    "Site",
    "Step",
    "Tape",
    "Tapped",
    "check_finite",
    "collector_at_rest",
    "exits_refused",
    "freeze",
    "root_module",
    "sites_of",
    "told_by_image",
]
