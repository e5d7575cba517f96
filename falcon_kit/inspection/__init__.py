"""What happens inside: tokens, attention, predictions and what they depend on.

The files, in the order of their imports:

plots/            values in, matplotlib figures out
views/            values in, self-contained HTML out
watch.py          hooks on a model that are always removed
probabilities.py  attention statistics without T x T maps of every head
attention.py      attention(), induction(): what every head looks at
lens.py           lens(): what each layer would predict
tokens.py         tokens(): what the tokenizer makes of a text
causes.py         ablate() and attribute(): what a prediction depends on
languages.py      compare_tokens(): what the same text costs in different languages
"""
