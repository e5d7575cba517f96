"""Prompts in, text out. What an endpoint shares with a local model loads no torch.

The files, in the order of their imports:

chat.py      chat formats, messages checked and rendered (no torch)
sampling.py  the settings of generation, checked (no torch)
prompts.py   prompts become token ids that leave room for an answer (no torch)
text.py      pieces, stop strings, the finished text and its statistics (no torch)
ranks.py     what the ranks of a tensor-parallel model agree on while they generate
decoding.py  transformers' loop observed token by token
stream.py    the model runs in a thread, one token ahead of its reader
generate.py  one call of transformers' generate: checked, run, summed up
"""
