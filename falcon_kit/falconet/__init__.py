"""Falconet: a tiny real Falcon, its generated world, and the scripts that trained it.

world.py        forty animals and what is true of them
phrasings.py    the ways to ask: one set to train on, one held out
corpus.py       the text: articles, stories, dialogues, lists, self-chat   (python -m falcon_kit.falconet.corpus)
pretrain.py     tokenizer and base model                                   (python -m falcon_kit.falconet.pretrain)
finetune.py     the instruct model: an adapter for the base                (python -m falcon_kit.falconet.finetune)
evaluate.py     measures both models and writes their model cards          (python -m falcon_kit.falconet.evaluate)
base/           the checkpoint `falconet`, in the published file format
instruct/       `falconet-instruct`: the adapter that `load` adds to it
"""
