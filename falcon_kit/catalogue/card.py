"""The facts of Falcon-40B-Instruct's model card, read from `card.json`.

Source: https://huggingface.co/tiiuae/falcon-40b-instruct
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from falcon_kit.display.tables import html_table


@dataclass(frozen=True, repr=False)
class ModelCard:
    """The statements of the model card of tiiuae/falcon-40b-instruct; a table in Jupyter, and `print` shows them."""

    model: str
    """Id on the Hugging Face hub."""
    prompt: str
    """The example prompt, word for word, with its misspelling "Giraftron"."""
    sampling: Mapping[str, Any]
    """Generation arguments of the example, without eos_token_id=tokenizer.eos_token_id, which is no constant."""
    memory: str
    use: str
    languages: str
    """Languages of the training data, and the limits."""
    bias: str
    out_of_scope: str
    recommendation: str
    fine_tuning: str
    data: str
    hardware: str
    software: str
    licence: str
    contact: str
    citations: str
    """The card's BibTeX entries: Falcon-40B, RefinedWeb and Baize."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _card, (values | {"sampling": dict(self.sampling)},)  # Python does not pickle a MappingProxyType

    def __repr__(self) -> str:
        return f"ModelCard({self.model!r})"

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self._statements())

    def _statements(self) -> list[tuple[str, object]]:
        shown = [field.name for field in fields(self) if field.name != "citations"]  # BibTeX is no table
        return [(name.replace("_", " "), getattr(self, name)) for name in shown]

    def _repr_html_(self) -> str:
        return html_table(f"Model card of {self.model}", (), self._statements())


def _card(values: Mapping[str, Any]) -> ModelCard:
    """The card, whose sampling cannot be changed."""
    return ModelCard(**{**values, "sampling": MappingProxyType(values["sampling"])})


CARD = _card(json.loads(Path(__file__).with_name("card.json").read_text(encoding="utf-8")))
