"""Run, take apart and fine-tune Falcon-40B-Instruct from a notebook.

    import falcon_kit as fk

    falcon = fk.load("falconet-instruct")
    print(falcon.generate("Hello", max_new_tokens=20))

Importing the kit loads neither torch nor transformers; `fk.load` does.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from falcon_kit.catalogue import CARD, FalconSpec, catalogue, spec
from falcon_kit.chat import ChatFormat, chat_format
from falcon_kit.environment import Environment, environment
from falcon_kit.planning import NotEnoughMemory, Plan, plan

if TYPE_CHECKING:
    from falcon_kit.data import Documents, dialogues, mix
    from falcon_kit.decoding import Piece
    from falcon_kit.falcon import Falcon
    from falcon_kit.generation import Generation, Stats, Stream
    from falcon_kit.loading import load
    from falcon_kit.merging import Merged, merge
    from falcon_kit.packing import Packed, pack
    from falcon_kit.runs import TuningRun
    from falcon_kit.sampling import Sampling
    from falcon_kit.settings import Tuning
    from falcon_kit.tuning import tune

__version__ = version("falcon-kit")

__all__ = [
    "CARD",
    "ChatFormat",
    "Documents",
    "Environment",
    "Falcon",
    "FalconSpec",
    "Generation",
    "Merged",
    "NotEnoughMemory",
    "Packed",
    "Piece",
    "Plan",
    "Sampling",
    "Stats",
    "Stream",
    "Tuning",
    "TuningRun",
    "catalogue",
    "chat_format",
    "dialogues",
    "environment",
    "load",
    "merge",
    "mix",
    "pack",
    "plan",
    "spec",
    "tune",
]

_ON_FIRST_USE = {
    "Documents": "data",
    "Falcon": "falcon",
    "Generation": "generation",
    "Merged": "merging",
    "Packed": "packing",
    "Piece": "decoding",
    "Sampling": "sampling",
    "Stats": "generation",
    "Stream": "generation",
    "Tuning": "settings",
    "TuningRun": "runs",
    "dialogues": "data",
    "load": "loading",
    "merge": "merging",
    "mix": "data",
    "pack": "packing",
    "tune": "tuning",
}


def __getattr__(name: str) -> Any:
    """Loads what needs torch when it is first asked for (PEP 562)."""
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'falcon_kit' has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = getattr(import_module(f"falcon_kit.{_ON_FIRST_USE[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
