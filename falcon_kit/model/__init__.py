"""Falcon itself: a subclass of transformers' Falcon with a grouped KV cache.

The files, in the order of their imports:

packed.py           attention within packed documents, without a mask
attention.py        attention over grouped KV heads, ALiBi, the matmul kernel for a single row on a CPU
cache.py            a KV cache with room for the next tokens
tensor_parallel.py  one all-reduce per layer for the parallel block
layers.py           a decoder layer
losses.py           cross-entropy in chunks of tokens, without all logits in memory
checks.py           errors for masks, caches and positions that do not fit
static_cache.py     decoding reads the filled slots of a static cache
modeling.py         FalconModel and FalconForCausalLM
"""
