"""Documents become an adapter.

The files, in the order of their imports:

data.py         dialogues and web text: read, checked, mixed
settings.py     settings of fine-tuning, with defaults by size of the model (no torch)
packing.py      documents become rows of tokens
distributed.py  several processes: copies of the weights, or shards
plots.py        loss curves (no torch)
measure.py      how many held-out answers end, and how many are exact
runs.py         TuningRun: the adapter, its losses, before and after, its model card
trainer.py      transformers' Trainer for adapters
progress.py     the plan, the progress bar and the live loss curve
tune.py         tune(): plan, train or resume, measure
"""
