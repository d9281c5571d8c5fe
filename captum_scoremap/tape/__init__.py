"""Record a model once, as a list of affine steps; everything else is algebra on that list.

To read it: ``steps`` has the list and the two ways to walk it; ``recording`` writes it. Every operation arrives there,
is looked up (``operation``), and becomes a step (``writing``) if a tensor that it reads is live (``run``). Beside that
stand what changes memory (``changes``, on ``memory``), what rounds (``quantized``), where layers begin (``taps``,
``module_tracker``), and what nobody saw (``sight``, ``exits``).
"""

from .boundary import Boundary
from .exits import exits_refused, would_be_baked_in
from .frozen_model import FrozenModel, freeze
from .module_tracker import ModuleTracker, Route, Site, root_module
from .recording import Recording
from .sight import collector_paused
from .steps import Step, Tape, Tapped, check_finite, nonfinite_allowed, sites_of

__all__ = [
    "Boundary",
    "FrozenModel",
    "ModuleTracker",
    "Recording",
    "Route",
    "Site",
    "Step",
    "Tape",
    "Tapped",
    "check_finite",
    "collector_paused",
    "exits_refused",
    "freeze",
    "nonfinite_allowed",
    "root_module",
    "sites_of",
    "would_be_baked_in",
]
