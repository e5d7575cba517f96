"""Tensor parallelism: processes that hold a part of every layer each.

The files, in the order of their imports:

workers.py    processes started, spoken to in lines of JSON, and ended together (no torch)
ranks.py      what a rank is, and what can be divided among ranks
serving.py    the worker's side: it loads its part and answers requests
launching.py  the notebook's side: a Falcon whose model lives in other processes
"""
