"""Values in, matplotlib figures out: colour-blind safe, titled, with units, readable in a dark theme."""
