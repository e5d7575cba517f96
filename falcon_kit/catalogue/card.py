"""The facts of Falcon-40B-Instruct's model card.

Sources: https://huggingface.co/tiiuae/falcon-40b-instruct and the papers that it cites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from falcon_kit.display.tables import html_table


@dataclass(frozen=True, repr=False)
class ModelCard:
    """The statements of the model card of tiiuae/falcon-40b-instruct; a table in Jupyter."""

    model: str
    """Id on the Hugging Face hub."""
    prompt: str
    """The example prompt, word for word, with its misspelling "Giraftron"."""
    sampling: Mapping[str, Any]
    """Generation arguments of the example, without eos_token_id=tokenizer.eos_token_id, which is no constant."""
    memory: str
    """Memory for inference."""
    use: str
    """Intended use."""
    languages: str
    """Languages of the training data, and the limits."""
    bias: str
    """Biases from the training data."""
    out_of_scope: str
    """Uses that are out of scope."""
    recommendation: str
    """Recommendations to users."""
    fine_tuning: str
    """Whether the model suits further fine-tuning."""
    data: str
    """Fine-tuning data."""
    hardware: str
    """Hardware of the training."""
    software: str
    """Software of the training."""
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
    """A paper that the model card cites, or that describes a part of the architecture."""

    authors: str
    """First author and "et al.", or the two authors."""
    year: int
    """Year of the first version."""
    title: str
    """Title as published."""
    arxiv: str | None
    """arXiv id; None for the model card's entry, which has no paper."""


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
