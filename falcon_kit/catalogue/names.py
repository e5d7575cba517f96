"""The Falcons that the kit knows by name, and the facts of Falcon-40B-Instruct's model card.

Nothing is downloaded, and neither torch nor transformers is imported.
Sources: the config.json files and the model card under https://huggingface.co/tiiuae.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from falcon_kit.catalogue.hub import fetch_config
from falcon_kit.catalogue.spec import FalconSpec, config_from_legacy, format_bytes, html_table

__all__ = [
    "CARD",
    "CITATIONS",
    "Catalogue",
    "Citation",
    "FalconSpec",
    "ModelCard",
    "adapted",
    "adapter_base",
    "catalogue",
    "config_from_legacy",
    "embedded_directory",
    "format_bytes",
    "html_table",
    "spec",
    "unknown_name",
]

_EMBEDDED = {"falconet": "base", "falconet-instruct": "instruct"}


class Catalogue(tuple[FalconSpec, ...]):
    """All the Falcons that the kit knows by name; a tuple, and a table in Jupyter."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Catalogue({', '.join(each.name for each in self)})"

    def _repr_html_(self) -> str:
        facts = [(each.name, each.facts()) for each in self]
        shown = [key for key in facts[0][1] if key not in ("head_dim", "vocabulary", "context", "source")]
        rows = [(name, *(values[key] for key in shown)) for name, values in facts]
        return html_table("Falcons that the kit knows by name", ("name", *shown), rows)


def catalogue() -> Catalogue:
    """All the Falcons known by name: the embedded two first, then the published ones."""
    return Catalogue(_embedded_specs() + _PUBLISHED)


def spec(name: str | os.PathLike[str]) -> FalconSpec:
    """One Falcon: by catalogue name (any case, with or without "tiiuae/"), directory, path of a config.json, or hub id.

    An adapter's directory stands for its base with the adapter in it. Of another hub id, the config.json
    is fetched and nothing else. Raises LookupError for a string that
    is none of these, ConnectionError where the hub cannot be reached, FileNotFoundError for a directory without a
    config.json, and ValueError for a config that is broken or not a Falcon's.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(
            f"a {type(name).__name__} is no name, directory or hub id; a loaded Falcon has its spec: falcon.spec"
        )
    path = Path(name).expanduser()
    if isinstance(name, str):
        known = {each.name.lower(): each for each in catalogue()}
        if found := known.get(name.strip().lower().removeprefix("tiiuae/")):
            return found
        if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            return _of_the_hub(name, list(known))
        if not path.exists():
            names = [each.name for each in known.values()]
            raise LookupError(f"{unknown_name('model', name, names)} Or give a directory or config.json that exists.")
    if base := adapter_base(path):
        return adapted(spec(base), path)
    file = path / "config.json" if path.is_dir() else path
    return FalconSpec.from_config(_read_json(file), file.absolute().parent.name, source=str(file))


def _of_the_hub(name: str, known: list[str]) -> FalconSpec:
    """The spec of a hub id. A name of tiiuae's that cannot be had may well be a slip: the nearest are named."""
    try:
        file = fetch_config(name)
    except (ConnectionError, LookupError) as error:
        if not name.startswith("tiiuae/"):
            raise
        raise LookupError(f"{unknown_name('model', name, known)} ({error})") from error
    return FalconSpec.from_config(_read_json(file), name, source=f"https://huggingface.co/{name}")


def adapter_base(directory: Path) -> str | None:
    """The model that the adapter in a directory was made for; None where there is a model, or neither."""
    file = directory / "adapter_config.json"
    if (directory / "config.json").is_file() or not file.is_file():
        return None
    base = _read_json(file).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file} does not say what the adapter was made for: fk.merge(adapter, base) takes a base too")
    return str(base)


def adapted(base: FalconSpec, adapter: Path) -> FalconSpec:
    """The spec of `base` with the adapter in a directory: the same shape under a name of its own."""
    folder = adapter.absolute()
    own = {embedded_directory(name): name for name in _EMBEDDED}
    name = folder.parent.name if folder.name == "adapter" else folder.name  # `tune` writes output_dir/adapter
    name = own.get(folder, name)
    return replace(base, name=name, fine_tuned_from=base.name, published=False, source=str(folder))


def embedded_directory(name: str) -> Path:
    """The directory that ships inside the package: "falconet", a checkpoint, or "falconet-instruct", its adapter."""
    if name not in _EMBEDDED:
        raise LookupError(unknown_name("embedded model", name, list(_EMBEDDED)))
    return Path(__file__).parents[1] / "falconet" / _EMBEDDED[name]


def unknown_name(kind: str, given: str, known: Sequence[str]) -> str:
    """The text of an error about a name that is not one of `known`: it gives the nearest ones, or else all of them."""
    names = {name.lower(): name for name in known}
    nearest = [names[name] for name in get_close_matches(given.strip().lower().rpartition("/")[2], names, cutoff=0.55)]
    hint = f"Nearest: {', '.join(nearest)}." if nearest else f"Known: {', '.join(known)}."
    return f"Unknown {kind} {given!r}. {hint}"


def _read_json(file: Path) -> dict[str, Any]:
    """A config.json as a dictionary."""
    if not file.is_file():
        held = sorted(each.name for each in file.parent.glob("*"))[:6] if file.parent.is_dir() else []
        raise FileNotFoundError(f"{file} does not exist; its directory holds {', '.join(held) or 'nothing'}.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); it may have been cut off: fetch it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, not the object that a config.json is.")
    return config


def _embedded_specs() -> tuple[FalconSpec, ...]:
    """The specs of what ships inside the package: the base as its own config says, and the adapter made for it."""
    config = embedded_directory("falconet") / "config.json"
    source = "falcon_kit/falconet/base/config.json"
    base = FalconSpec.from_config(_read_json(config), "falconet", licence="Apache 2.0", source=source)
    return base, replace(base, name="falconet-instruct", fine_tuned_from=base.name)


def _published(name: str, layers: int, d_model: int, query_heads: int, kv_heads: int, **other: Any) -> FalconSpec:
    """A published Falcon: what all of them share, and where its config stands."""
    shared = {"vocabulary": 65024, "feed_forward": 4 * d_model, "licence": "Apache 2.0", "published": True}
    source = f"https://huggingface.co/tiiuae/{name}/blob/main/config.json"
    return FalconSpec(name, layers, d_model, query_heads, kv_heads, source=source, **{**shared, **other})


_7B: dict[str, Any] = {"norms_per_block": 1, "new_decoder_architecture": False}
_180B: dict[str, Any] = {"licence": "Falcon-180B TII License"}
_RW: dict[str, Any] = {"positions": "alibi", "parallel_block": False, "bias": True, "new_decoder_architecture": False}
_PUBLISHED = (
    _published("falcon-40b-instruct", 60, 8192, 128, 8, fine_tuned_from="falcon-40b"),
    _published("falcon-40b", 60, 8192, 128, 8),
    _published("falcon-7b-instruct", 32, 4544, 71, 1, fine_tuned_from="falcon-7b", **_7B),
    _published("falcon-7b", 32, 4544, 71, 1, **_7B),
    _published("falcon-180B-chat", 80, 14848, 232, 8, fine_tuned_from="falcon-180B", **_180B),
    _published("falcon-180B", 80, 14848, 232, 8, **_180B),
    _published("falcon-rw-1b", 24, 2048, 32, 32, vocabulary=50304, **_RW),
    _published("falcon-rw-7b", 36, 4096, 64, 64, **_RW),
)


@dataclass(frozen=True, repr=False)
class ModelCard:
    """What the model card of tiiuae/falcon-40b-instruct says; a table in Jupyter."""

    model: str
    """Id on the Hugging Face hub."""
    prompt: str
    """The card's example prompt, word for word (its "Giraftron" too)."""
    sampling: Mapping[str, Any]
    """The card's generation arguments; it adds eos_token_id=tokenizer.eos_token_id, which a constant cannot hold."""
    memory: str
    """Memory that inference takes."""
    use: str
    """What the model was made for."""
    languages: str
    """What it was trained on, and where it does not reach."""
    bias: str
    """What the training data brings with it."""
    out_of_scope: str
    """What it must not be used for."""
    recommendation: str
    """What the card asks of its users."""
    fine_tuning: str
    """Whether to start a model of your own from this one."""
    data: str
    """Fine-tuning data."""
    hardware: str
    """Where it was trained."""
    software: str
    """What trained it."""
    licence: str
    """Licence of the weights."""
    contact: str
    """Address of the authors."""

    def __repr__(self) -> str:
        return f"ModelCard({self.model!r})"

    def _repr_html_(self) -> str:
        rows = [(field.name.replace("_", " "), getattr(self, field.name)) for field in fields(self)]
        return html_table(f"Model card of {self.model}", (), rows)


@dataclass(frozen=True)
class Citation:
    """A paper that the card, or this kit's explanation of the architecture, rests on."""

    authors: str
    """First author and "et al.", or the two authors."""
    year: int
    """Year of the first version."""
    title: str
    """Title as published."""
    arxiv: str | None
    """arXiv id; None for the card's own entry, which has none."""


CARD = ModelCard(
    model="tiiuae/falcon-40b-instruct",
    prompt=(
        "Girafatron is obsessed with giraffes, the most glorious animal on the face of this Earth. Giraftron believes "
        "all other animals are irrelevant when compared to the glorious majesty of the giraffe.\n"
        "Daniel: Hello, Girafatron!\nGirafatron:"
    ),
    sampling=MappingProxyType({"max_length": 200, "do_sample": True, "top_k": 10, "num_return_sequences": 1}),
    memory="At least 85 to 100 GB to run inference with Falcon-40B swiftly.",
    use="Chat: fine-tuned on a chat dataset.",
    languages="Mainly English; it does not generalise appropriately to other languages.",
    bias="Trained on a large corpus representative of the web, it carries the stereotypes and biases common online.",
    out_of_scope=(
        "Production use without adequate assessment of risks and mitigation; "
        "any use case that may be considered irresponsible or harmful."
    ),
    recommendation="Develop guardrails, and take appropriate precautions for any production use.",
    fine_tuning="An instruct model may not be ideal for further fine-tuning: start your own from Falcon-40B.",
    data="150M tokens of Baize chat data mixed with 5% of RefinedWeb, tokenized with the Falcon-7B/40B tokenizer.",
    hardware="AWS SageMaker, 64 A100 40GB GPUs in P4d instances.",
    software=(
        "Gigatron, a custom distributed training codebase: 3D parallelism combined with ZeRO "
        "and high-performance Triton kernels (FlashAttention and others)."
    ),
    licence="Apache 2.0",
    contact="falconllm@tii.ae",
)

CITATIONS: Mapping[str, Citation] = MappingProxyType(
    {
        "falcon40b": Citation(
            "Almazrouei et al.",
            2023,
            "Falcon-40B: an open large language model with state-of-the-art performance",
            None,
        ),
        "refinedweb": Citation(
            "Penedo et al.",
            2023,
            "The RefinedWeb dataset for Falcon LLM: outperforming curated corpora with web data, and web data only",
            "2306.01116",
        ),
        "baize": Citation(
            "Xu et al.",
            2023,
            "Baize: An Open-Source Chat Model with Parameter-Efficient Tuning on Self-Chat Data",
            "2304.01196",
        ),
        "falcon-series": Citation("Almazrouei et al.", 2023, "The Falcon Series of Open Language Models", "2311.16867"),
        "gpt-3": Citation("Brown et al.", 2020, "Language Models are Few-Shot Learners", "2005.14165"),
        "rotary": Citation(
            "Su et al.", 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", "2104.09864"
        ),
        "multi-query": Citation(
            "Shazeer", 2019, "Fast Transformer Decoding: One Write-Head is All You Need", "1911.02150"
        ),
        "flash-attention": Citation(
            "Dao et al.",
            2022,
            "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
            "2205.14135",
        ),
    }
)
