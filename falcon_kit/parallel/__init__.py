"""Tensor parallelism: processes that hold a part of every layer each.

The files, in the order of their imports:

workers.py    worker processes: started, sent lines of JSON, ended together (no torch)
ranks.py      the ranks: what can be loaded on them, and what one process holds
worker.py     the worker process: it loads its part and answers requests
launching.py  the notebook's process: a Falcon whose weights are in worker processes
"""
