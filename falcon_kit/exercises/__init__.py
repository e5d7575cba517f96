"""Exercises that check themselves: `fk.check("06.1", answer)`.

The files, in the order of their imports:

outcome.py      what a check returns, and what the checks of the notebooks share (no torch)
notebook_00.py  the checks of notebook 00, Start here (no torch)
notebook_01.py  the checks of notebook 01, Inference (no torch)
notebook_02.py  the checks of notebook 02, The playground (no torch)
notebook_03.py  the checks of notebook 03, The tokenizer (no torch)
notebook_04.py  the checks of notebook 04, Architecture (no torch)
notebook_05.py  the checks of notebook 05, Attention (no torch)
notebook_06.py  the checks of notebook 06, Fine-tuning with LoRA (no torch)
notebook_07.py  the checks of notebook 07, Quantisation (no torch)
notebook_08.py  the checks of notebook 08, Several GPUs (no torch)
notebook_09.py  the checks of notebook 09, Evaluation and safety (no torch)
notebook_10.py  the checks of notebook 10, Serving (no torch)
check.py        `check`: the number of an exercise and an answer in, an Outcome out (no torch)

A file of a notebook has a function for each exercise: `exercise_1`, `exercise_2`, ... It returns what a right answer
shows, or raises Hint. Its docstring states the form of the answer; `check` shows it where there is no answer yet.
"""
