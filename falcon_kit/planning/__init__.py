"""Where the notebook runs, what a model needs there, and whether it fits.

The files, in the order of their imports:

places.py       which notebook service this is
environment.py  versions, accelerators, cores, memory and disk of this machine
devices.py      devices to plan for: this machine's, or GPUs and instance types by name
services.py     what a notebook service offers on request: secrets, widgets, SageMaker's role
placement.py    which device holds which layers
plots.py        a plan as stacked bars
plan.py         plan(): does it fit, where does each part go, what to do if not
"""
