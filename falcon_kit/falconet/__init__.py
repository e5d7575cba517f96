"""Falconet: a tiny real Falcon, its generated world, and the scripts that trained it.

world.py        forty animals and what is true of them
phrasings.py    the ways to ask: one set to train on, one held out
corpus.py       the text: articles, stories, dialogues, lists, self-chat   (python -m falcon_kit.falconet.corpus)
pretrain.py     tokenizer, base model, instruct model                      (python -m falcon_kit.falconet.pretrain)
evaluate.py     measures both models and writes their model cards          (python -m falcon_kit.falconet.evaluate)
base/           the checkpoint `falconet`, in the published file format
instruct/       the checkpoint `falconet-instruct`
"""
