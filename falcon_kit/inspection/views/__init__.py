"""Values in, self-contained escaped HTML out."""
