"""Where the notebook runs, and whether a model fits there.

The files, in the order of their imports:

places.py        the notebook service of this process
environment.py   versions, GPUs, CPU cores, memory and disk of this machine
devices.py       devices to plan for: this machine's, or GPUs and instance types by name
services.py      functions of notebook services: secrets, widgets, SageMaker's role
placement.py     the parts of a plan, and which device holds which
plots.py         a plan as stacked bars
plan.py          plan(): whether a model fits, and what to change if not
requirements.py  requirements(): what a notebook takes: download, memory and minutes
"""
