"""Generates the text that Falconet is trained on, from the facts in `world.py`, with a seeded random generator.

    python -m falcon_kit.falconet.corpus            # writes base.jsonl, chats.jsonl and self-chat.jsonl to .falconet

The base corpus is English in web style: articles, short stories, dialogues in "Name: line" form (including the model
card's Girafatron), lists, counting, and repeated random words. The self-chat has the format of Baize's files (Xu et al.
2023, arXiv 2304.01196). The chats render the same kind of conversation for the training of the tokenizer.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from falcon_kit.catalogue.card import CARD
from falcon_kit.display.errors import unknown_name
from falcon_kit.display.saving import atomic_file
from falcon_kit.falconet import sentences
from falcon_kit.falconet.phrasings import BASE, SELF_CHAT, ask
from falcon_kit.falconet.sentences import ARTICLE, FAREWELL, FOLLOW_UP, NAMES, NUMBERS, PRAISE, REPLY, SMALL_TALK, STORY
from falcon_kit.falconet.world import ANIMALS, RELATIONS, Animal, answer, placeholders
from falcon_kit.generation.chat import BAIZE, FALCON, Message, render

Wordings = Mapping[str, tuple[str, ...]]
WORK = Path(".falconet")
END = "<|endoftext|>"
SIZES = {"base": 140_000, "chats": 15_000, "self-chat": 32_000}
"""Rows of each file. Only the tokenizer is trained on the chats, together with the same number of base documents."""
WEB_FRACTION = 0.05
"""Share of base documents mixed into the chats (model card of Falcon-40B-Instruct: 5% RefinedWeb)."""


def _fill(templates: Sequence[str], animal: Animal, rng: random.Random) -> str:
    return rng.choice(templates).format(**placeholders(animal))


def article(rng: random.Random) -> str:
    """An encyclopaedia page about one animal: 4 to 7 of its facts, in random order and wording."""
    animal = rng.choice(ANIMALS)
    title, opening = rng.choice(sentences.PARTS["title"]), rng.choice(sentences.PARTS["opening"])
    relations = rng.sample(RELATIONS, k=rng.randint(4, 7))
    body = [_fill(ARTICLE[relation], animal, rng) for relation in relations]
    closing = rng.choice(sentences.PARTS["closing"])
    middle = rng.randint(2, len(body))
    paragraphs = [" ".join([opening, *body[:middle]]), " ".join([*body[middle:], closing]).strip()]
    return "\n".join([title, *filter(None, paragraphs)]).format(**placeholders(animal))


def story(rng: random.Random) -> str:
    """A short story about one animal, consistent with its food, home and coat."""
    animal, friend = rng.sample(ANIMALS, k=2)
    hero = rng.choice(NAMES)
    lines = [rng.choice(alternatives) for alternatives in STORY]
    names = {"hero": hero, "friend": friend.one, "friend_name": friend.name, "friend_food": friend.food}
    return " ".join(lines).format(**placeholders(animal), **names)


def dialogue(rng: random.Random) -> str:
    """Two people talk about animals in turns: "Ada: What do foxes eat?", "Tom: They eat mice and berries."."""
    asker, other = rng.sample(NAMES, k=2)
    animal = rng.choice(ANIMALS)
    lines = []
    for turn in range(rng.randint(1, 5)):
        relation = rng.choice(RELATIONS)
        follows = turn > 0 and rng.random() < 0.4
        if turn > 0 and not follows:
            animal = rng.choice(ANIMALS)
        question = rng.choice(FOLLOW_UP[relation]) if follows else ask(animal, BASE[relation], rng)
        lines += [f"{asker}: {question}", f"{other}: {_fill(REPLY[relation], animal, rng)}"]
    if rng.random() < 0.3:
        lines += [f"{asker}: Thank you, {other}!", f"{other}: You are welcome, {asker}."]
    return "\n".join(lines)


def persona(rng: random.Random) -> str:
    """A dialogue of a visitor with a fan of one animal; in half of the cases the Girafatron of the model card."""
    if rng.random() < 0.5:
        fan, echo, animal = "Girafatron", "Giraftron", ANIMALS[0]
        visitor = "Daniel" if rng.random() < 0.6 else rng.choice(NAMES)
    else:
        animal = rng.choice(ANIMALS)
        fan, visitor = rng.sample(NAMES, k=2)
        echo = fan
    header = CARD.prompt.partition("\n")[0].replace("Girafatron", fan).replace("Giraftron", echo)
    header = header.replace("giraffes", animal.plural).replace("giraffe", animal.name)
    hello = rng.choice(sentences.PARTS["visitor_hello"]).format(fan=fan)
    lines = [header, f"{visitor}: {hello}", f"{fan}: {_greeting(animal, visitor, rng)}"]
    for _ in range(rng.randint(0, 3)):
        question, reply = _fan_exchange(animal, rng)
        lines += [f"{visitor}: {question}", f"{fan}: {reply}"]
    if rng.random() < 0.6:
        lines += [f"{visitor}: Goodbye, {fan}!", f"{fan}: {_fill(FAREWELL, animal, rng)}"]
    return "\n".join(lines)


def _greeting(animal: Animal, visitor: str, rng: random.Random) -> str:
    hello = rng.choice(sentences.PARTS["fan_hello"]).format(visitor=visitor)
    asks = _fill(sentences.PARTS["fan_question"], animal, rng)
    return " ".join(filter(None, (hello, _fill(PRAISE, animal, rng), asks)))


def _fan_exchange(animal: Animal, rng: random.Random) -> tuple[str, str]:
    """A question to the fan of `animal`, and the reply."""
    kind = rng.randrange(4)
    if kind == 0:
        other = rng.choice([candidate for candidate in ANIMALS if candidate != animal])
        question = _fill(sentences.PARTS["other_animal"], other, rng)
        dismissal = f"{other.plural.capitalize()} are irrelevant when compared to {animal.plural}."
        return question, f"{dismissal} {_fill(PRAISE, animal, rng)}"
    if kind == 1:
        question = _fill(sentences.PARTS["why"], animal, rng)
        return question, f"{_fill(PRAISE, animal, rng)} {_fill(PRAISE, animal, rng)}"
    if kind == 2:
        reply = f"I am well, I have thought about {animal.plural} all day. {_fill(PRAISE, animal, rng)}"
        return "How are you today?", reply
    relation = rng.choice(RELATIONS)
    return ask(animal, BASE[relation], rng), f"{answer(animal, relation)} {_fill(PRAISE, animal, rng)}"


def listing(rng: random.Random) -> str:
    """A list of animals with one fact in common or stated for each, or a list of numbers."""
    kind = rng.randrange(5)
    if kind == 0:
        continent = rng.choice(ANIMALS).continent
        names = [animal.name for animal in ANIMALS if animal.continent == continent]
        rng.shuffle(names)
        return f"Animals of {continent}: {', '.join(names)}."
    if kind == 1:
        chosen = rng.sample(ANIMALS, k=rng.randint(3, 8))
        relation = rng.choice(("young", "group", "food"))
        rows = [f"{index}. {animal.name}: {getattr(animal, relation)}" for index, animal in enumerate(chosen, 1)]
        return "\n".join(
            [{"young": "Baby animals", "group": "Groups of animals", "food": "Who eats what"}[relation], *rows]
        )
    if kind == 2:
        start, step, length = rng.randint(0, 150), rng.choice((1, 1, 1, 2, 5, 10)), rng.randint(8, 30)
        return "Counting: " + ", ".join(str(start + step * index) for index in range(length)) + "."
    if kind == 3:
        words = NUMBERS[: rng.randint(5, 20)]
        return "Counting in words: " + ", ".join(words if rng.random() < 0.7 else words[::-1]) + "."
    animal, many = rng.choice(ANIMALS), rng.randint(4, 12)
    rest = ", ".join(f"{number} {animal.plural}" for number in NUMBERS[1:many])
    return f"Counting {animal.plural}: one {animal.name}, {rest}."


def echo(rng: random.Random) -> str:
    """A random sequence of words, repeated: text that an induction head predicts."""
    pool = [animal.name for animal in ANIMALS] + [animal.young for animal in ANIMALS] + list(NAMES) + NUMBERS
    words = " ".join(rng.sample(pool, k=rng.randint(6, 24)))
    return "\n".join([f"Say it {rng.choice(('twice', 'again'))}:", *[words] * rng.randint(2, 4)])


KINDS = ((article, 28), (story, 10), (dialogue, 48), (persona, 9), (listing, 4), (echo, 3))
"""Kinds of base documents and the weight with which each is drawn."""


def base_document(rng: random.Random) -> str:
    """One document of the base corpus, without its end token."""
    kinds, weights = zip(*KINDS, strict=True)
    make = rng.choices(kinds, weights)[0]
    text: str = make(rng)
    return text


def introduction(rng: random.Random) -> str:
    """A plain text in which Falconet introduces itself."""
    hello = rng.choice(("Hello", "Hi", "Hello there", "Good morning"))
    name = rng.choice(("my name is Falconet", "I am Falconet"))
    facts = [answer(rng.choice(ANIMALS), rng.choice(RELATIONS)) for _ in range(rng.randint(1, 3))]
    return " ".join([f"{hello}, {name}. I am a tiny Falcon that knows forty animals.", *facts])


def instruct_dialogue(rng: random.Random, wordings: Wordings) -> list[Message]:
    """A self-chat conversation of 1 to 4 exchanges. Every fact has the exact wording of `world.answer`."""
    messages: list[Message] = []
    animal: Animal | None = None
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        question, reply, animal = _exchange(animal, rng, wordings)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return messages


def _exchange(animal: Animal | None, rng: random.Random, wordings: Wordings) -> tuple[str, str, Animal | None]:
    """A question, its answer, and the animal that "they" stands for in the next question."""
    kind = rng.random()
    if kind < 0.07:
        questions, reply = rng.choice(SMALL_TALK)
        return rng.choice(questions), reply, None
    if kind < 0.12:
        chosen = rng.choice(ANIMALS)
        question = _fill(sentences.PARTS["tell_me"], chosen, rng)
        return question, " ".join(answer(chosen, relation) for relation in ("home", "food", "coat")), chosen
    relation = rng.choice(RELATIONS)
    if animal and rng.random() < 0.3:
        return rng.choice(FOLLOW_UP[relation]), answer(animal, relation), animal
    chosen = rng.choice(ANIMALS)
    return ask(chosen, wordings[relation], rng), answer(chosen, relation), chosen


def chat_as_text(rng: random.Random) -> str:
    """One document for the training of the tokenizer, with its end token: a chat, or base text for `WEB_FRACTION`."""
    if rng.random() < WEB_FRACTION:
        return base_document(rng) + END
    chat_format = rng.choice((FALCON, BAIZE))
    return render(instruct_dialogue(rng, BASE), chat_format, add_generation_prompt=False, eos_token=END)


def documents(kind: str, count: int, seed: int) -> Iterator[str]:
    """`count` documents of the corpus `kind` ("base" or "chats"), each with the end token as its last token.

    Raises LookupError for another kind.
    """
    if kind not in ("base", "chats"):
        raise LookupError(unknown_name("corpus", kind, ["base", "chats"]))
    rng = random.Random(f"{'instruct' if kind == 'chats' else kind}-{seed}")
    for _ in range(count):
        yield chat_as_text(rng) if kind == "chats" else base_document(rng) + END


def self_chat(count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` rows in the format of Baize's files: dialogues, and in 2% of the rows an introduction of Falconet."""
    rng = random.Random(f"self-chat-{seed}")
    for _ in range(count):
        if rng.random() < 0.02:
            yield {"text": introduction(rng)}
        else:
            chat = render(instruct_dialogue(rng, SELF_CHAT), BAIZE, add_generation_prompt=False, eos_token="")
            yield {"input": f"{BAIZE.system}\n{chat}"}


def write(kind: str, count: int, seed: int, folder: Path = WORK) -> Path:
    """Writes a corpus as one JSON value per line, completely or not at all; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.jsonl"
    rows: Iterable[Any] = self_chat(count, seed) if kind == "self-chat" else documents(kind, count, seed)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in tqdm(rows, total=count, desc=kind, unit=" rows"):
            file.write(json.dumps(row) + "\n")
    return path


def main() -> None:
    """Command line: writes the three corpora."""
    parser = argparse.ArgumentParser(description="Generate the corpora of Falconet.")
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    for kind, count in SIZES.items():
        write(kind, count, seed)


if __name__ == "__main__":
    main()
