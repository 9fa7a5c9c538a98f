"""Positional Label: where a token is, as a second label in training."""
