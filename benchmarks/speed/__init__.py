"""Timing of training steps and attention."""
