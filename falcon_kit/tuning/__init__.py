"""Documents become an adapter: `tune` and what it needs."""
