"""Exercises that check themselves: `fk.check("06.1", answer)`.

The files, in the order of their imports:

outcome.py      what a check returns, and what the checks of the notebooks share (no torch)
notebook_00.py  the checks of notebook 00, Start here: a function `exercise_1`, `exercise_2`, ... for each (no torch)
check.py        `check`: the number of an exercise and an answer in, an Outcome out (no torch)

The docstring of an exercise's function states the form of its answer; `check` shows it where there is no answer yet.
"""
