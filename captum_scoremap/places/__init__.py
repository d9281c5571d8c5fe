"""Where the elements of a run's tensors stand in the image.

``placement`` says it of any value: by its layout, where what was moved tells it (``layouts``, ``turns``), else by its
shape; ``positions`` tells what stands at positions from what only looks like it, ``sums`` what summed over them;
``frame`` says where the image lies in what the network sees.
"""

from .frame import Frame, frame_of
from .placement import Entry, MixedImagesError, Placement, warn_of_no_maps

__all__ = ["Entry", "Frame", "MixedImagesError", "Placement", "frame_of", "warn_of_no_maps"]
