"""Facts about the Falcon family: shapes, names, the model card, bytes in closed form.

The files, in the order of their imports:

card.py    what the model card of Falcon-40B-Instruct says, and the papers
hub.py     the Hugging Face hub: a config by itself, errors in plain words
spec.py    FalconSpec: the shape that a config describes, its parameters and bytes
memory.py  bytes in closed form: weights by dtype, KV cache, activations, training
names.py   a name, directory or hub id becomes a FalconSpec
"""
