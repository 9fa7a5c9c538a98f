"""How long training steps and attention take."""
