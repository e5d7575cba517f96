"""A name becomes a Falcon: checkpoints, adapters, quantisation.

The files, in the order of their imports:

adapters.py      LoRA adapters on disk, and their sum with a checkpoint's weights
checkpoints.py   where a checkpoint lies and whether it is complete
quantization.py  8-bit and 4-bit weights: chosen, counted after loading, saved
compiling.py     decoding with a static cache and a compiled step
checks.py        settings of load() that do not go together
falcon.py        Falcon: a model, its tokenizer, and what can be done with them
load.py          load(): find, plan, fetch, read
merging.py       merge(): an adapter added to the weights, checked by its logits
"""
