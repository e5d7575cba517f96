"""Run, inspect, fine-tune and judge Falcon-40B-Instruct from a notebook.

    import falcon_kit as fk

    falcon = fk.load("falconet-instruct")
    print(falcon.generate("Hello", max_new_tokens=20))

Importing the kit loads neither torch nor transformers; `fk.load` does.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from falcon_kit.catalogue.card import CARD
from falcon_kit.catalogue.gguf import GGUFFile, gguf_file
from falcon_kit.catalogue.names import catalogue, spec
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.remarks import drop_remarks
from falcon_kit.generation.chat import ChatFormat, chat_format
from falcon_kit.guardrails import Blocked, Verdict, guardrails
from falcon_kit.planning.environment import Environment, environment
from falcon_kit.planning.plan import NotEnoughMemory, Plan, plan
from falcon_kit.playground import playground

if TYPE_CHECKING:
    from falcon_kit.evaluation.bias import BiasReport, bias
    from falcon_kit.evaluation.comparison import Comparison
    from falcon_kit.evaluation.evaluate import evaluate
    from falcon_kit.evaluation.results import Evaluation
    from falcon_kit.exercises.check import check
    from falcon_kit.exercises.outcome import Outcome
    from falcon_kit.explanation.view import Explanation, explain
    from falcon_kit.generation.sampling import Sampling
    from falcon_kit.generation.stream import Stream
    from falcon_kit.generation.text import Generation, Piece, Stats
    from falcon_kit.guardrails.guard import Guardrails
    from falcon_kit.inspection.ablation import Ablation, ablate, ablated
    from falcon_kit.inspection.attention import AttentionView, attention, induction, repeated_tokens
    from falcon_kit.inspection.attribution import Attribution, attribute
    from falcon_kit.inspection.languages import TokenReport, compare_tokens, published_tokens, sample_texts
    from falcon_kit.inspection.lens import LensView, lens
    from falcon_kit.inspection.tokens import TokenView, tokens
    from falcon_kit.loading.falcon import Falcon
    from falcon_kit.loading.load import load
    from falcon_kit.loading.merging import Merged, merge
    from falcon_kit.parallel.launching import ParallelFalcon
    from falcon_kit.planning.requirements import Requirements, requirements
    from falcon_kit.serving.endpoint import Endpoint, connect
    from falcon_kit.serving.gguf import export_gguf
    from falcon_kit.serving.serve import Served, serve
    from falcon_kit.serving.stream import IncompleteAnswer
    from falcon_kit.tuning.data import Documents, dialogues, mix
    from falcon_kit.tuning.packing import Packed, pack
    from falcon_kit.tuning.runs import TuningRun
    from falcon_kit.tuning.settings import Tuning
    from falcon_kit.tuning.tune import tune

__version__ = version("falcon-kit")
drop_remarks()  # here, since a notebook may import PEFT before it loads a model

__all__ = [
    "CARD",
    "Ablation",
    "AttentionView",
    "Attribution",
    "BiasReport",
    "Blocked",
    "ChatFormat",
    "Comparison",
    "Documents",
    "Endpoint",
    "Environment",
    "Evaluation",
    "Explanation",
    "Falcon",
    "FalconSpec",
    "GGUFFile",
    "Generation",
    "Guardrails",
    "IncompleteAnswer",
    "LensView",
    "Merged",
    "NotEnoughMemory",
    "Outcome",
    "Packed",
    "ParallelFalcon",
    "Piece",
    "Plan",
    "Requirements",
    "Sampling",
    "Served",
    "Stats",
    "Stream",
    "TokenReport",
    "TokenView",
    "Tuning",
    "TuningRun",
    "Verdict",
    "ablate",
    "ablated",
    "attention",
    "attribute",
    "bias",
    "catalogue",
    "chat_format",
    "check",
    "compare_tokens",
    "connect",
    "dialogues",
    "environment",
    "evaluate",
    "explain",
    "export_gguf",
    "gguf_file",
    "guardrails",
    "induction",
    "lens",
    "load",
    "merge",
    "mix",
    "pack",
    "plan",
    "playground",
    "published_tokens",
    "repeated_tokens",
    "requirements",
    "sample_texts",
    "serve",
    "spec",
    "tokens",
    "tune",
]

_ON_FIRST_USE = {
    "evaluation.bias": "BiasReport bias",
    "evaluation.comparison": "Comparison",
    "evaluation.evaluate": "evaluate",
    "evaluation.results": "Evaluation",
    "exercises.check": "check",
    "exercises.outcome": "Outcome",
    "explanation.view": "Explanation explain",
    "generation.sampling": "Sampling",
    "generation.stream": "Stream",
    "generation.text": "Generation Piece Stats",
    "guardrails.guard": "Guardrails",
    "inspection.ablation": "Ablation ablate ablated",
    "inspection.attention": "AttentionView attention induction repeated_tokens",
    "inspection.attribution": "Attribution attribute",
    "inspection.languages": "TokenReport compare_tokens published_tokens sample_texts",
    "inspection.lens": "LensView lens",
    "inspection.tokens": "TokenView tokens",
    "loading.falcon": "Falcon",
    "loading.load": "load",
    "loading.merging": "Merged merge",
    "parallel.launching": "ParallelFalcon",
    "planning.requirements": "Requirements requirements",
    "serving.endpoint": "Endpoint connect",
    "serving.gguf": "export_gguf",
    "serving.serve": "Served serve",
    "serving.stream": "IncompleteAnswer",
    "tuning.data": "Documents dialogues mix",
    "tuning.packing": "Packed pack",
    "tuning.runs": "TuningRun",
    "tuning.settings": "Tuning",
    "tuning.tune": "tune",
}
"""Names that need torch, or what takes long to import, by module."""
_MODULES = {name: module for module, names in _ON_FIRST_USE.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Loads what needs torch when it is first asked for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'falcon_kit' has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = getattr(import_module(f"falcon_kit.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
