"""`load()`: checkpoints, adapters, quantisation.

The files, in the order of their imports:

gguf.py          weights and tokenizer read from a GGUF file
adapters.py      LoRA adapters on disk
adapter_checks.py whether an adapter can be added to weights, and to those of a certain model
adding.py        a checkpoint's state dict with adapters added
checkpoints.py   a checkpoint: found by name, fetched from the hub, checked
tokenizer.py     its tokenizer, chat format and generation config
packed.py        linear layers with 8-bit and 4-bit weights on torch's own kernels
quantizer.py     packed layers quantised while weights are read, saved, and read again
quantization.py  8-bit and 4-bit weights: chosen, counted after loading, saved
compiling.py     decoding with a static cache and torch.compile
checks.py        the settings of load(), and what it refuses before a download
reading.py       weights read into a model: device map, adapters, quantisation
writing.py       a model and its tokenizer written to a folder
falcon.py        Falcon: a model and its tokenizer, with methods to generate, stream, chat and save
load.py          load(): find, plan, fetch, read
merging.py       merge(): an adapter added to the weights, checked by its logits
"""
