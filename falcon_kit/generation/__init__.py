"""Prompts in, text out: chat formats, sampling settings, decoding, streams."""
