"""Measures both embedded models and writes the figures into their model cards.

python -m falcon_kit.falconet.evaluate    # a few minutes on 2 cores
"""

import json
import math
import random
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from falcon_kit.catalogue.card import CARD
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.saving import write_text
from falcon_kit.evaluation.evaluate import evaluate
from falcon_kit.evaluation.scoring import Row, score
from falcon_kit.evaluation.tasks import Task, make_task
from falcon_kit.falconet import corpus
from falcon_kit.falconet.phrasings import HELD_OUT, phrase
from falcon_kit.falconet.world import ANIMALS, RELATIONS, answer
from falcon_kit.generation.chat import BAIZE, FALCON, ChatFormat
from falcon_kit.inspection.attention import induction
from falcon_kit.inspection.hooks import inspect_model
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.load import load

HELD_OUT_SEED = 1
TEXTS_SEED = 9
"""Neither training used it: the base model read documents of seed 0, the adapter those of 0 and 1."""
QUESTIONS = 200
CONTINUATIONS = 20
PERIOD = 64


def held_out_questions(count: int = QUESTIONS) -> Task:
    """`count` different questions about facts, the relations in turn, in wordings that no corpus contains."""
    rng = random.Random(HELD_OUT_SEED)
    pairs = {
        relation: [(animal, template) for animal in ANIMALS for template in HELD_OUT[relation]]
        for relation in RELATIONS
    }
    for each in pairs.values():
        rng.shuffle(each)
    rows = []
    for number in range(count):
        relation = RELATIONS[number % len(RELATIONS)]
        animal, template = pairs[relation].pop()
        rows.append({"question": phrase(template, animal, rng), "answer": answer(animal, relation)})
    return make_task("held-out", ((f"question {number}", row) for number, row in enumerate(rows, 1)))


def exact_answers(falcon: Falcon, chat_format: ChatFormat, task: Task) -> float:
    """The share of questions whose greedy answer is exactly the expected one."""
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


def induction_scores(falcon: Falcon) -> tuple[NDArray[np.floating[Any]], float]:
    """The mean induction score of each head over eight sequences, (layers, query heads), and the chance level."""
    found = [induction(falcon, PERIOD, seed=seed) for seed in range(8)]
    scores = np.mean([each.statistics["induction"] for each in found], axis=0)
    return scores, found[0].chance["induction"]


def continuations(falcon: Falcon, known: set[str]) -> tuple[int, int, list[str]]:
    """Samples the model card's example with seeds 0 to 19, each until the visitor's next line.

    How many mention giraffes, how many end before the length limit, and their words that are not `known`.
    """
    seeds = range(CONTINUATIONS)
    answers = [falcon.generate(CARD.prompt, stop="\nDaniel:", seed=seed, **CARD.sampling) for seed in seeds]
    about_giraffes = sum("giraffe" in each.text.lower() for each in answers)
    ended = sum(each.finish_reason != "length" for each in answers)
    return about_giraffes, ended, sorted({word for each in answers for word in words(each.text)} - known)


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
    about_giraffes, ended, unknown_words = continuations(falcon, known)
    questions = held_out_questions()
    formats = {each.name: exact_answers(falcon, each, questions) for each in (FALCON, BAIZE)}
    return {
        "held-out perplexity (base corpus)": f"{perplexity(falcon):.2f}",
        f"exact answers to {QUESTIONS} held-out phrasings, `User:` form": f"{formats['falcon']:.1%}",
        f"exact answers to {QUESTIONS} held-out phrasings, Baize form": f"{formats['baize']:.1%}",
        "highest induction score": f"{scores.max():.2f} (layer {layer}, head {head}; chance {chance:.3f})",
        "heads with an induction score above 0.5": f"{int((scores > 0.5).sum())} of {scores.size}",
        "card's prompt, sampled: mentions giraffes": f"{about_giraffes} of {CONTINUATIONS}",
        "card's prompt, sampled: ends before the length limit": f"{ended} of {CONTINUATIONS}",
        "card's prompt, sampled: words that are not in the corpus": ", ".join(unknown_words) or "none",
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
