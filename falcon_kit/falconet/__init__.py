"""Falconet: a tiny real Falcon, the world its training text is generated from, and the scripts that trained it.

The files, in the order of their imports:

world.py      forty animals, seven facts each
sentences.py  the sentence templates of the generated text
phrasings.py  the question templates, one set of them held out
corpus.py     the text: articles, stories, dialogues (python -m falcon_kit.falconet.corpus)
pretrain.py   the tokenizer and the base model (python -m falcon_kit.falconet.pretrain)
finetune.py   falconet-instruct, an adapter for the base (python -m falcon_kit.falconet.finetune)
tasks.py      the tasks of `fk.evaluate` about that world (python -m falcon_kit.falconet.tasks)
evaluate.py   measures both models and writes their model cards (python -m falcon_kit.falconet.evaluate)
"""
