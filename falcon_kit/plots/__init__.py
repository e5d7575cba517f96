"""Values in, matplotlib figures out: plain numbers and numpy arrays, nothing of a model."""
