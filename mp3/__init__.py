"""MP3: position prediction as pre-training."""
