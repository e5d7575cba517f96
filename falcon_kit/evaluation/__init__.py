"""How good a model is: perplexity, tasks, comparisons, bias.

The files, in the order of their imports:

statistics.py   intervals of means, shares and ratios; tests of paired differences (no torch)
progress.py     finished parts of a run, so that it can go on after an interruption (no torch)
scoring.py      log-probabilities of given tokens, in batches
texts.py        a text, a file or documents, as `evaluate` takes them (no torch)
perplexity.py   perplexity in windows over the context
tasks.py        questions with choices or exact answers, from jsonl files
task_results.py the results of a task, item by item (no torch)
comparison.py   Comparison: paired tests of two models
plots.py        values with their intervals (no torch)
results.py      Evaluation: a table, a figure, a JSON file
models.py       what a task asks a model for
local.py        a model in this process
remote.py       a model behind an endpoint
answering.py    a model's answers to a task
harness.py      EleutherAI's lm-eval on any of these models
evaluate.py     evaluate()
bias.py         bias(): pairs of sentences by their likelihood
"""
