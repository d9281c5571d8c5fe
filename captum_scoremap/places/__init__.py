"""Where the elements of a run's tensors stand in the image.

``following`` takes positions along from the images through each step of a run, with ``moves`` for those steps that move
elements; ``positions`` are the image, row and column of each element, ``cells`` where in a map they are, and
``placement`` adds numbers up there. ``frame`` says where the image lies in what the network sees.
"""

from .frame import Frame, frame_of
from .placement import Entry, MixedImagesError, Placement, warn_of_no_maps

__all__ = ["Entry", "Frame", "MixedImagesError", "Placement", "frame_of", "warn_of_no_maps"]
