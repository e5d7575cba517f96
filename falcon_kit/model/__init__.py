"""Falcon itself: a subclass of transformers' Falcon with a grouped KV cache.

The files, in the order of their imports:

products.py         how a CPU multiplies by a weight matrix: in slabs, or a single row without oneDNN
packed_documents.py where packed documents begin; attention within them, without a mask
attention.py        attention over grouped KV heads, ALiBi, the kernels of a step
cache.py            a KV cache with room for the next tokens
tensor_parallel.py  one all-reduce per layer for the parallel block
layers.py           a decoder layer
losses.py           cross-entropy in chunks of tokens, without all logits in memory
checks.py           errors for masks, caches and positions that do not fit
static_cache.py     decoding reads the filled slots of a static cache
modeling.py         FalconModel and FalconForCausalLM
"""
