"""Tests of captum_scoremap; ``python -m tests`` runs the whole check."""
