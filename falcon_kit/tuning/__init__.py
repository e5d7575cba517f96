"""`tune()` trains an adapter on documents.

The files, in the order of their imports:

files.py             rows of files, each with its line (no torch)
forms.py             a row of any form becomes a conversation or a text, or is refused (no torch)
data.py              documents: read, checked, split, mixed
settings.py          settings of fine-tuning, with defaults by size of the model (no torch)
packing.py           documents become rows of tokens
checks.py            models and vocabularies that tune() refuses
distributed.py       several processes: copies of the weights, or shards
shards.py            the shards of a sharded run, saved and loaded without pickles that could run code
memory_plan.py       whether training fits into memory, and what to change if not
plots.py             loss curves (no torch)
measure.py           stop rate and exact answers on held-out conversations; texts that show what is forgotten
verdict.py           what a run learned and forgot, in sentences (no torch)
checkpoint_files.py  complete checkpoints: names, file lists, which to keep (no torch)
callbacks.py         Ctrl-C saves the step first; a run resumes in any folder; adapters without a gradient are an error
runs.py              TuningRun: the adapter, its losses, before and after, its model card
trainer.py           transformers' Trainer for adapters
run_folder.py        the output_dir belongs to one run: run.json, the adapter and its record
progress.py          the plan, the progress bar and the live loss curve
tune.py              tune(): plan, train or resume, measure
"""
