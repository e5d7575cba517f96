"""Where the notebook runs, and whether a model fits there.

The files, in the order of their imports:

places.py       the notebook service of this process
environment.py  versions, GPUs, CPU cores, memory and disk of this machine
downloads.py    the disk for a published model's files
machines.py     GPUs and machines by the words that people type, published prices and reports
devices.py      devices to plan for: this machine's, or GPUs and instance types by name
sagemaker.py    the SageMaker app of this notebook: role, region, instance type
processor.py    what this machine's processors multiply, and which dtype is fast there
placement.py    the parts of a plan, and which device holds which
suggestions.py  what to change where a model does not fit
plots.py        a plan as stacked bars
plan.py         plan(): whether a model fits, and what to change if not
requirements.py requirements(): what a notebook takes: download, memory and minutes
"""
