"""Falcon itself: a subclass of transformers' Falcon with a grouped KV cache."""
