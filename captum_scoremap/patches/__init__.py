"""Semantic patches: which image regions the highest values of a layer come from (Yu et al. 2015, Section 4)."""

from captum_scoremap.patches.semantic import By, Patch, semantic_patches

__all__ = ["By", "Patch", "semantic_patches"]
