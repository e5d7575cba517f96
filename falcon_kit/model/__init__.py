"""Falcon itself: a subclass of transformers' Falcon with a grouped KV cache.

The files, in the order of their imports:

attention.py        attention over grouped keys, ALiBi, the matmul kernel of a single row on a CPU
tensor_parallel.py  how the ranks of tensor parallelism add up a layer's outputs
layers.py           a decoder layer
losses.py           cross-entropy that never holds all logits
checks.py           masks, caches and positions that are refused
modeling.py         FalconModel and FalconForCausalLM
"""
