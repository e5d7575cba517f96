"""Falcon outside this process: endpoints, deployment settings, GGUF files."""
