"""Prompts in, text out. Files that an endpoint uses too import neither torch nor transformers.

The files, in the order of their imports:

control_tokens.py  control tokens of a chat template become tokens, those in messages stay text; thread-safe (no torch)
rendering.py       a chat template becomes text, by plain jinja2 or by transformers; thread-safe (no torch)
chat.py            chat formats; conversations checked, rendered and encoded (no torch)
own_format.py      the format of a checkpoint's own chat template (no torch)
sampling.py        the settings of generation (no torch)
prompts.py         prompts checked and encoded; the limit of new tokens (no torch)
text.py            pieces of a stream, stop strings, the finished text and its statistics (no torch)
waiting.py         waiting for another thread so that Ctrl-C is noticed (no torch)
training.py        while fk.tune trains a model, no other thread uses it (no torch)
guarding.py        guardrails that a caller passes: prompts and texts are checked (no torch)
calls.py           what generate returns for which prompt, for type checkers (no torch)
arguments.py       keyword arguments of transformers' generate expanded and checked
ranks.py           events and seeds that the ranks of a tensor-parallel model share
decoding.py        from the tokens of a step to text; the random state of a request
kept_cache.py      the static cache of a compiled model, kept between calls
steps.py           transformers' loops of token after token, as generators
stream.py          a text that is computed as far as it is read
generate.py        one call of transformers' generate: arguments checked, text and statistics returned
batches.py         any number of texts, in batches of similar lengths
"""
