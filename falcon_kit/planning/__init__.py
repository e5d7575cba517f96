"""Where the notebook runs, what a model needs, and whether it fits."""
