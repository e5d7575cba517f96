"""Values in, HTML out: every view is self-contained, offline, escaped, and readable without JavaScript."""
