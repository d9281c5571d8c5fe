"""Faster ways to do what the rules state plainly, and narrower ways to hold what they freeze.

``FAST`` names them. It may be emptied: whatever is computed stays what it is, bit for bit or, where sums are taken in
another order, but for rounding, only slower and in more memory. A graph that is to be compiled is traced so, for a
compiler vectorizes the plain form and finds ways of its own.
"""

from .convolutions import convolved_otherwise, transposed_otherwise
from .packed import Packed
from .table import FAST, faster, plainly

__all__ = ["FAST", "Packed", "convolved_otherwise", "faster", "plainly", "transposed_otherwise"]
