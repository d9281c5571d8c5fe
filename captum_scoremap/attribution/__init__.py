"""Captum's attribution classes for score maps: drop-ins beside Integrated Gradients and Grad-CAM."""

from .complete import CompleteScoreMap
from .fused import FusedScoreMap
from .image import ScoreMap
from .layer import LayerScoreMap
from .neuron import NeuronScoreMap

__all__ = ["CompleteScoreMap", "FusedScoreMap", "LayerScoreMap", "NeuronScoreMap", "ScoreMap"]
