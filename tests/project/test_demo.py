"""The demo: the card's example in its own process, then a notebook in another one."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))
import demo


def test_the_demo_gives_the_memory_of_the_gpus_back_before_a_notebook_loads_the_model_again(monkeypatch):
    done = []
    for place, name in ((demo, "answer_the_card"), (torch.cuda, "empty_cache"), (demo, "execute")):
        monkeypatch.setattr(place, name, lambda *_, name=name: done.append(name))
    demo.main()
    assert done == ["answer_the_card", "empty_cache", "execute"]
