"""How good is an attribution: does it add up, and does it point at what the network uses?

Every metric takes the attribution as a plain callable ``attribute(inputs, target) -> (N, C or 1, h, w)``, so
that all methods run through the very same code: ``LayerScoreMap(model, layer).attribute`` is one, and so is
any class of Captum. Maps of several channels are summed over them, smaller maps are enlarged to the size of
the inputs. Metrics return one value per image, never the mean: how many images there are, and how much they
vary, belongs to the result. Infidelity and sensitivity are in ``captum.metrics``.
"""

from captum_scoremap.metrics.cause import CauseGame, cause_game, single_deletion
from captum_scoremap.metrics.completeness import completeness
from captum_scoremap.metrics.composite import Arcc, arcc
from captum_scoremap.metrics.confidence import MaskedConfidence, masked_confidence
from captum_scoremap.metrics.maps import Attribution, input_sized
from captum_scoremap.metrics.patch import patch_score, strongest_window
from captum_scoremap.metrics.perturbation import PerturbationCurve, deletion, insertion
from captum_scoremap.metrics.pointing import energy_pointing_game, grid_pointing_game, mosaics, pointing_game
from captum_scoremap.metrics.randomization import parameter_randomization
from captum_scoremap.metrics.remove_and_debias import Road, road

__all__ = [
    "Arcc",
    "Attribution",
    "CauseGame",
    "MaskedConfidence",
    "PerturbationCurve",
    "Road",
    "arcc",
    "cause_game",
    "completeness",
    "deletion",
    "energy_pointing_game",
    "grid_pointing_game",
    "input_sized",
    "insertion",
    "masked_confidence",
    "mosaics",
    "parameter_randomization",
    "patch_score",
    "pointing_game",
    "road",
    "single_deletion",
    "strongest_window",
]
