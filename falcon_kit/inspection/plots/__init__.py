"""Values in, matplotlib figures out."""
