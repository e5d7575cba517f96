"""How good a model is: perplexity, tasks, comparisons, bias.

The files, in the order of their imports:

statistics.py  intervals of means, shares and ratios; tests of paired differences (no torch)
scoring.py     log-probabilities of given tokens, in batches
texts.py       a text, a file or documents, as `evaluate` takes them (no torch)
perplexity.py  perplexity in windows over the context
"""
