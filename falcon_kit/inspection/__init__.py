"""Inspection of a model: tokens, attention, predictions and what they depend on.

The files, in the order of their imports:

token.py          one token: of a text, and by itself
plots/            values in, matplotlib figures out
views/            values in, self-contained HTML out
hooks.py          the inspected model, and forward hooks that are always removed
probabilities.py  attention probabilities in blocks: statistics of every head without T x T maps
attention.py      attention() and induction(): attention statistics and maps
predictions.py    next-token predictions and surprisal
lens.py           lens(): the logit lens and logit contributions
ablation.py       ablate() and ablated(): predictions without some heads
attribution.py    attribute(): how much each prompt token adds to a prediction
tokens.py         tokens(): ids, bytes and characters of each token
languages.py      compare_tokens(): token counts of texts in different languages
"""
