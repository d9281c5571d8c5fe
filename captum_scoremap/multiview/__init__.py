"""Score images of any size by every view of them at once (Section 2.1-2.2 of the paper)."""

from captum_scoremap.multiview.module import MultiView

__all__ = ["MultiView"]
