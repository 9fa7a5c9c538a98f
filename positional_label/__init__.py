"""Positional Label: the position of each token as an auxiliary training label."""
