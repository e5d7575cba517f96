"""How results are shown and bad input is refused."""
