"""Facts about the Falcon family: shapes, names, the model card, bytes in closed form.

The files, in the order of their imports:

card.py        the model card of Falcon-40B-Instruct
hub.py         the Hugging Face hub: the config of a repository, plain error texts
spec.py        FalconSpec: the shape that a config describes, its parameters and bytes
memory.py      the dtypes, and bytes in closed form: weights, KV cache, activations, training
gguf_header.py the header of a GGUF file: metadata, and where each tensor lies
gguf.py        gguf_file(): a Falcon in a GGUF file: its shape, its tensors and their kinds
names.py       the FalconSpec of a name, directory or hub id
"""
