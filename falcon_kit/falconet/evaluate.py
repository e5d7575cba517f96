"""Measures both embedded models and writes the figures into their model cards.

python -m falcon_kit.falconet.evaluate    # a few minutes on 2 cores
"""

import json
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from textwrap import fill

import torch
from transformers import FalconForCausalLM

from falcon_kit.catalogue.card import CARD
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.saving import write_text
from falcon_kit.evaluation.evaluate import evaluate
from falcon_kit.evaluation.scoring import Row, score
from falcon_kit.evaluation.tasks import make_task
from falcon_kit.falconet import corpus
from falcon_kit.falconet.phrasings import HELD_OUT, phrase
from falcon_kit.falconet.world import ANIMALS, RELATIONS, Animal, answer
from falcon_kit.generation.chat import BAIZE, FALCON, ChatFormat
from falcon_kit.inspection.hooks import inspect_model
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.load import load

HELD_OUT_SEED = 1
TEXTS_SEED = 9
"""Neither training used it: the base model read documents of seed 0, the adapter those of 0 and 1."""
QUESTIONS = 200
CONTINUATIONS = 20
PERIOD = 64


@dataclass(frozen=True)
class Question:
    """A question about one fact in a held-out wording, and the only answer that counts as exact."""

    text: str
    expected: str


def held_out_questions(count: int = QUESTIONS, seed: int = HELD_OUT_SEED) -> list[Question]:
    """`count` different questions, the relations in turn, in wordings that no corpus contains."""
    rng = random.Random(seed)
    pairs = {
        relation: [(animal, template) for animal in ANIMALS for template in HELD_OUT[relation]]
        for relation in RELATIONS
    }
    for each in pairs.values():
        rng.shuffle(each)

    def question(animal: Animal, template: str, relation: str) -> Question:
        return Question(phrase(template, animal, rng), answer(animal, relation))

    relations = [RELATIONS[index % len(RELATIONS)] for index in range(count)]
    return [question(*pairs[relation].pop(), relation) for relation in relations]


def exact_answers(falcon: Falcon, chat_format: ChatFormat, questions: Iterable[Question]) -> float:
    """Share of `questions` whose greedy answer is exactly the expected one."""
    rows = [{"question": question.text, "answer": question.expected} for question in questions]
    task = make_task("held-out", ((f"question {number}", row) for number, row in enumerate(rows, 1)))
    found = evaluate(replace(falcon, loaded_format=chat_format), task, chat=True)
    return found[task.name].estimate("exact_match").value


def held_out_texts(count: int) -> list[str]:
    """`count` base documents of a seed that no training used; short ones, such as counts, may repeat a trained text."""
    return list(corpus.documents("base", count, TEXTS_SEED))


def perplexity(falcon: Falcon, documents: int = 300) -> float:
    """exp of the mean loss per token over `held_out_texts`."""
    rows = [Row(tuple(ids), len(ids) - 1) for ids in falcon.tokenizer(held_out_texts(documents))["input_ids"]]
    scores = score(inspect_model(falcon), rows)
    return math.exp(-sum(each.total for each in scores) / sum(row.scored for row in rows))


def induction_scores(falcon: Falcon, rows: int = 8) -> tuple[torch.Tensor, float]:
    """Induction score of each head, (layers, query heads), and the chance level.

    A sequence of S random tokens is repeated once; the score is the mean of A[i, i-S+1] over the second copy (Olsson et
    al. 2022, arXiv 2209.11895): the attention to the token after the first occurrence. Chance is uniform attention.
    """
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    once = torch.randint(13, falcon.model.config.vocab_size, (rows, PERIOD), generator=generator)
    eager = FalconForCausalLM._from_config(falcon.model.config, attn_implementation="eager").eval()
    eager.load_state_dict(falcon.model.state_dict())
    with torch.inference_mode():
        layers = eager(once.repeat(1, 2), output_attentions=True, use_cache=False).attentions
    query = torch.arange(PERIOD, 2 * PERIOD)
    scores = torch.stack([layer[:, :, query, query - PERIOD + 1].mean(dim=(0, 2)) for layer in layers])
    return scores, float((1 / (query + 1)).mean())


@dataclass(frozen=True)
class Continuations:
    """Counts over `total` sampled continuations of the model card's prompt."""

    total: int
    about_giraffes: int
    ended: int
    unknown_words: tuple[str, ...]


def continuations(falcon: Falcon, known: set[str]) -> Continuations:
    """Samples the model card's example with seeds 0 to 19, each until the visitor's next line."""
    answers = [
        falcon.generate(CARD.prompt, stop="\nDaniel:", seed=seed, **CARD.sampling) for seed in range(CONTINUATIONS)
    ]
    return Continuations(
        total=len(answers),
        about_giraffes=sum("giraffe" in each.text.lower() for each in answers),
        ended=sum(each.finish_reason != "length" for each in answers),
        unknown_words=tuple(sorted({word for each in answers for word in words(each.text)} - known)),
    )


def words(text: str) -> list[str]:
    """The words and numbers of a text, in the case in which they are written."""
    return re.findall(r"\w+", text)


def corpus_words() -> set[str]:
    """The set of words of all corpora."""
    texts = (text for kind in ("base", "chats") for text in corpus.documents(kind, corpus.SIZES[kind], seed=0))
    chats = (text for row in corpus.self_chat(corpus.SIZES["self-chat"], seed=0) for text in row.values())
    return {word for text in chain(texts, chats) for word in words(text)}


def measure(falcon: Falcon, known: set[str]) -> dict[str, str]:
    """The rows of the model card's table: name and value."""
    scores, chance = induction_scores(falcon)
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    sampled = continuations(falcon, known)
    questions = held_out_questions()
    formats = {each.name: exact_answers(falcon, each, questions) for each in (FALCON, BAIZE)}
    return {
        "held-out perplexity (base corpus)": f"{perplexity(falcon):.2f}",
        f"exact answers to {QUESTIONS} held-out phrasings, `User:` form": f"{formats['falcon']:.1%}",
        f"exact answers to {QUESTIONS} held-out phrasings, Baize form": f"{formats['baize']:.1%}",
        "highest induction score": f"{scores.max():.2f} (layer {layer}, head {head}; chance {chance:.3f})",
        "heads with an induction score above 0.5": f"{int((scores > 0.5).sum())} of {scores.numel()}",
        "card's prompt, sampled: mentions giraffes": f"{sampled.about_giraffes} of {sampled.total}",
        "card's prompt, sampled: ends before the length limit": f"{sampled.ended} of {sampled.total}",
        "card's prompt, sampled: words that are not in the corpus": ", ".join(sampled.unknown_words) or "none",
    }


MODEL_CARD = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
CARD_TEXTS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("cards.json").read_text(encoding="utf-8"))
"""What the two model cards do not have in common, by the name of the model."""


def model_card(spec: FalconSpec, figures: dict[str, str]) -> str:
    """The README.md of an embedded model."""
    texts = CARD_TEXTS[spec.name]
    return MODEL_CARD.format(
        name=spec.name,
        parameters=spec.parameters,
        layers=spec.layers,
        d_model=spec.d_model,
        heads=spec.query_heads,
        kv_heads=spec.kv_heads,
        context=spec.context,
        origin=texts["origin"],
        description=fill(texts["description"], width=120),
        making=fill(texts["making"], width=120),
        table="\n".join(f"| {name} | {value} |" for name, value in figures.items()),
    )


def main() -> None:
    """Command line: measures both models, prints the figures and writes the model cards."""
    known = corpus_words()
    for name in CARD_TEXTS:
        falcon = load(name, dtype="float32")
        figures = measure(falcon, known)
        print(f"\n{name}", *(f"  {key}: {value}" for key, value in figures.items()), sep="\n")
        write_text(embedded_directory(name) / "README.md", model_card(falcon.spec, figures))


if __name__ == "__main__":
    main()
