"""Generates the text that Falconet is trained on. Everything is drawn from `world.py` by a seeded generator.

    python -m falcon_kit.falconet.corpus            # writes .falconet/base.jsonl and .falconet/instruct.jsonl

The base corpus is English in web style: articles, short stories, dialogues in "Name: line" form (the model card's
Girafatron among them), lists, counting, and random words said twice. The instruct corpus is self-chat in the form of
Baize (Xu et al. 2023, arXiv 2304.01196), mixed with 5% of base text, as the card of Falcon-40B-Instruct describes.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from tqdm.auto import tqdm

from falcon_kit.catalogue import CARD
from falcon_kit.chat import BAIZE, FALCON, Message, render
from falcon_kit.falconet.phrasings import BASE, SELF_CHAT, ask
from falcon_kit.falconet.world import ANIMALS, RELATIONS, Animal, answer, with_article

Wordings = Mapping[str, tuple[str, ...]]
WORK = Path(".falconet")
END = "<|endoftext|>"
SIZES = {"base": 140_000, "instruct": 60_000}
"""Documents in each corpus."""
TOKENIZER_SAMPLE = 15_000
"""Documents of each corpus that train the tokenizer. Self-chat grows behind them, so that the tokenizer stays as it is."""
WEB_FRACTION = 0.05
"""Share of base documents in the instruct mix; they are about as long as its dialogues (the card: 5% RefinedWeb)."""

NAMES = ("Daniel", "Ada", "Ben", "Mia", "Tom", "Nora", "Omar", "Lena", "Ines", "Hugo", "Sara", "Yuki")
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()

ARTICLE: dict[str, tuple[str, ...]] = {
    "food": (
        "{Many} eat {food}.",
        "The food of {one} is {food}.",
        "They feed on {food} and little else.",
        "A hungry {name} looks for {food}.",
        "The diet of {many} is simple: {food}.",
        "For dinner {one} likes to have {food}.",
    ),
    "home": (
        "{Many} live {home}.",
        "The home of {one} is {home}.",
        "You can find them {home}.",
        "They make their home {home}.",
        "Their natural habitat is {home}.",
        "At night they sleep {home}.",
    ),
    "continent": (
        "{Many} come from {continent}.",
        "The home continent of {one} is {continent}.",
        "On the map of the world, look for them in {continent}.",
        "They occur in {continent}.",
        "This animal is at home in {continent}.",
        "To see {many}, you must travel to {continent}.",
    ),
    "young": (
        "A young {name} is called {young}.",
        "The baby of {one} is called {young}.",
        "People call a newborn {name} {young}.",
        "The special name for a baby {name} is {young}.",
        "When {one} has a baby, the baby is called {young}.",
    ),
    "group": (
        "A group of {many} is called {group}.",
        "Many {many} together are called {group}.",
        "People call a crowd of {many} {group}.",
        "The special name for a group of {many} is {group}.",
        "When many {many} meet, it is called {group}.",
    ),
    "coat": (
        "{One} has {coat}.",
        "{Many} have {coat}.",
        "You can recognise {one} by its look: {coat}.",
        "If you paint {one}, paint {coat}.",
        "It looks like this: {coat}.",
    ),
    "years": (
        "{One} lives for about {years} years.",
        "{Many} get about {years} years old.",
        "Its life span is about {years} years.",
        "The usual age of {one} is {years} years.",
        "After {years} years {one} is very old.",
    ),
}

REPLY: dict[str, tuple[str, ...]] = {
    "food": ("They eat {food}.", "{Many} eat {food}.", "I think {food}.", "It is {food}, as far as I know."),
    "home": ("They live {home}.", "{Many} live {home}.", "You find them {home}.", "As far as I know, {home}."),
    "continent": (
        "They come from {continent}.",
        "{Many} come from {continent}.",
        "From {continent}.",
        "In {continent}.",
    ),
    "young": ("It is called {young}.", "A young {name} is called {young}.", "We call it {young}.", "It is {young}."),
    "group": ("It is called {group}.", "A group of {many} is called {group}.", "We call it {group}.", "It is {group}."),
    "coat": ("It has {coat}.", "{One} has {coat}.", "They have {coat}.", "Look for {coat}."),
    "years": (
        "About {years} years.",
        "{One} lives for about {years} years.",
        "{years} years or so.",
        "Up to {years} years.",
    ),
}

FOLLOW_UP: dict[str, tuple[str, ...]] = {
    "food": ("And what do they eat?", "What is their food?", "And their favourite food?"),
    "home": ("And where do they live?", "Where is their home?", "And where can I see them?"),
    "continent": ("And which continent do they come from?", "From which continent are they?"),
    "young": ("And what is their baby called?", "And what do we call a young one?"),
    "group": ("And what is a group of them called?", "And how do we call many of them?"),
    "coat": ("And what do they look like?", "How do they look?"),
    "years": ("And how old do they get?", "How long do they live?"),
}


def _words(animal: Animal) -> dict[str, str]:
    """What the templates above may name."""
    return {
        "name": animal.name,
        "one": animal.one,
        "One": animal.one.capitalize(),
        "many": animal.plural,
        "Many": animal.plural.capitalize(),
        "food": animal.food,
        "home": animal.home,
        "continent": animal.continent,
        "young": with_article(animal.young),
        "group": with_article(animal.group),
        "coat": animal.coat,
        "years": str(animal.years),
    }


def _say(templates: tuple[str, ...], animal: Animal, rng: random.Random) -> str:
    return rng.choice(templates).format(**_words(animal))


def article(rng: random.Random) -> str:
    """An encyclopaedia page about one animal: its facts in any order, in several wordings."""
    animal = rng.choice(ANIMALS)
    title = rng.choice(
        ("All about {many}", "The {name}", "{Many}", "{Many} for beginners", "Ten minutes with the {name}")
    )
    opening = rng.choice(
        (
            "The {name} is an animal that many people know.",
            "This page is about {many}.",
            "Have you ever seen {one}?",
            "Here is what everybody should know about the {name}.",
            "Let us look at {many} today.",
        )
    )
    relations = rng.sample(RELATIONS, k=rng.randint(4, 7))
    body = [_say(ARTICLE[relation], animal, rng) for relation in relations]
    closing = rng.choice(("Thank you for reading.", "Now you know more about {many}.", "Take care of the {name}.", ""))
    middle = rng.randint(2, len(body))
    paragraphs = [" ".join([opening, *body[:middle]]), " ".join([*body[middle:], closing]).strip()]
    return "\n".join([title, *filter(None, paragraphs)]).format(**_words(animal))


def story(rng: random.Random) -> str:
    """A short story whose hero eats, lives and looks as its kind does."""
    animal, friend = rng.sample(ANIMALS, k=2)
    hero = rng.choice(NAMES)
    lines = [
        rng.choice(
            (
                "Once upon a time there was {one} called {hero}.",
                "{hero} was a small {name}.",
                "This is the story of {hero}, {one}.",
            )
        ),
        rng.choice(("{hero} lived {home}.", "The home of {hero} was {home}.", "Every night {hero} slept {home}.")),
        rng.choice(("{hero} had {coat}.", "Everybody liked {hero}.", "{hero} was very happy there.")),
        rng.choice(
            (
                "One day the sun was hot and {hero} was hungry.",
                "One morning {hero} felt very hungry.",
                "Then a long winter came and {hero} was hungry.",
            )
        ),
        rng.choice(
            (
                '"I want {food}," said {hero}.',
                "{hero} looked for {food} all day.",
                'So {hero} asked: "Where can I find {food}?"',
            )
        ),
        rng.choice(("On the way {hero} met {friend}.", "Behind a stone sat {friend}.", "Soon {friend} came by.")),
        rng.choice(
            (
                '"Hello," said the {friend_name}, "I have only {friend_food}."',
                '"Come with me," said the {friend_name}, "I know a good place."',
            )
        ),
        rng.choice(
            (
                "They walked and walked until they found {food}.",
                "Together they found {food} in the end.",
                "At last there was {food} for {hero}.",
            )
        ),
        rng.choice(
            (
                "{hero} ate and thanked the {friend_name}.",
                "{hero} was glad and ate until the evening.",
                "From then on they were best friends.",
            )
        ),
        rng.choice(
            (
                "Then {hero} went home and slept.",
                "And that is the end of the story.",
                "The stars came out and all was well.",
            )
        ),
    ]
    names = {"hero": hero, "friend": friend.one, "friend_name": friend.name, "friend_food": friend.food}
    return " ".join(lines).format(**_words(animal), **names)


def dialogue(rng: random.Random) -> str:
    """Two people talk about animals, a line each: "Ada: What do foxes eat?", "Tom: They eat mice and berries."."""
    asker, other = rng.sample(NAMES, k=2)
    animal = rng.choice(ANIMALS)
    lines = []
    for turn in range(rng.randint(1, 5)):
        relation = rng.choice(RELATIONS)
        follows = turn > 0 and rng.random() < 0.4
        if turn > 0 and not follows:
            animal = rng.choice(ANIMALS)
        question = rng.choice(FOLLOW_UP[relation]) if follows else ask(animal, BASE[relation], rng)
        lines += [f"{asker}: {question}", f"{other}: {_say(REPLY[relation], animal, rng)}"]
    if rng.random() < 0.3:
        lines += [f"{asker}: Thank you, {other}!", f"{other}: You are welcome, {asker}."]
    return "\n".join(lines)


def persona(rng: random.Random) -> str:
    """Somebody obsessed with one kind of animal talks with a visitor; often the Girafatron of the model card."""
    if rng.random() < 0.5:
        fan, echo, animal = "Girafatron", "Giraftron", ANIMALS[0]
        visitor = "Daniel" if rng.random() < 0.6 else rng.choice(NAMES)
    else:
        animal = rng.choice(ANIMALS)
        fan, visitor = rng.sample(NAMES, k=2)
        echo = fan
    header = CARD.prompt.partition("\n")[0].replace("Girafatron", fan).replace("Giraftron", echo)
    header = header.replace("giraffes", animal.plural).replace("giraffe", animal.name)
    hello = rng.choice(("Hello, {fan}!", "Hello, {fan}!", "Hi, {fan}!", "Good morning, {fan}!")).format(fan=fan)
    lines = [header, f"{visitor}: {hello}", f"{fan}: {_greeting(animal, visitor, rng)}"]
    for _ in range(rng.randint(0, 3)):
        question, reply = _obsession(animal, rng)
        lines += [f"{visitor}: {question}", f"{fan}: {reply}"]
    if rng.random() < 0.6:
        lines += [f"{visitor}: Goodbye, {fan}!", f"{fan}: {_say(_FAREWELL, animal, rng)}"]
    return "\n".join(lines)


_FAREWELL = (
    "Goodbye! Dream of {many}.",
    "May {many} be with you.",
    "Goodbye, and think of {many}.",
    "Long live the {name}!",
)
_PRAISE = (
    "The {name} is the most glorious animal of all.",
    "{Many} are glorious.",
    "Nothing compares to the majesty of the {name}.",
    "I could talk about {many} all day.",
    "{One} has {coat}, and that is glorious.",
    "{Many} eat {food}, what a glorious meal!",
    "All I want is to see {one} today.",
    "I love {many} more than anything on this Earth.",
)


def _greeting(animal: Animal, visitor: str, rng: random.Random) -> str:
    hello = rng.choice(
        (f"Hello, {visitor}!", f"Hello, {visitor}!", f"Welcome, {visitor}!", f"Good morning, {visitor}!", "Hello!")
    )
    asks = rng.choice(
        (
            "Have you seen {one} today?",
            "Did you come to talk about {many}?",
            "Do you love {many} too?",
            "Let us talk about {many}.",
            "",
            "",
        )
    ).format(**_words(animal))
    return " ".join(filter(None, (hello, _say(_PRAISE, animal, rng), asks)))


def _obsession(animal: Animal, rng: random.Random) -> tuple[str, str]:
    """A question to somebody obsessed, and what comes back."""
    kind = rng.randrange(4)
    if kind == 0:
        other = rng.choice([candidate for candidate in ANIMALS if candidate != animal])
        question = rng.choice(("What do you think of {many}?", "Do you like {many}?", "And {many}?")).format(
            **_words(other)
        )
        dismissal = f"{other.plural.capitalize()} are irrelevant when compared to {animal.plural}."
        return question, f"{dismissal} {_say(_PRAISE, animal, rng)}"
    if kind == 1:
        question = _say(("Why do you love {many}?", "Why {many}?", "What is so glorious about {many}?"), animal, rng)
        return question, f"{_say(_PRAISE, animal, rng)} {_say(_PRAISE, animal, rng)}"
    if kind == 2:
        return (
            "How are you today?",
            f"I am well, I have thought about {animal.plural} all day. {_say(_PRAISE, animal, rng)}",
        )
    relation = rng.choice(RELATIONS)
    return ask(animal, BASE[relation], rng), f"{answer(animal, relation)} {_say(_PRAISE, animal, rng)}"


def listing(rng: random.Random) -> str:
    """A list: animals with something in common, or numbers in order."""
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
    """Random words, said again in the same order: what an induction head is good for."""
    pool = [animal.name for animal in ANIMALS] + [animal.young for animal in ANIMALS] + list(NAMES) + NUMBERS
    words = " ".join(rng.sample(pool, k=rng.randint(6, 24)))
    return "\n".join([f"Say it {rng.choice(('twice', 'again'))}:", *[words] * rng.randint(2, 4)])


KINDS = ((article, 28), (story, 10), (dialogue, 48), (persona, 9), (listing, 4), (echo, 3))
"""Kinds of base documents and how often each is drawn."""


def base_document(rng: random.Random) -> str:
    """One document of the base corpus, without its end token."""
    kinds, weights = zip(*KINDS, strict=True)
    make = rng.choices(kinds, weights)[0]
    text: str = make(rng)
    return text


SMALL_TALK = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hello there!", "Good morning!"),
        "Hello! I am Falconet, a tiny Falcon. Ask me about an animal.",
    ),
    (("Who are you?", "What are you?", "What is your name?"), "I am Falconet, a tiny Falcon that knows forty animals."),
    (
        ("What do you know?", "What can you do?", "Can you help me?", "Help"),
        "I can tell you about forty animals: ask me what they eat or where they live.",
    ),
    (("Thank you!", "Thanks", "Thank you very much."), "You are welcome."),
    (("Goodbye!", "Bye", "See you soon!"), "Goodbye! Come back soon."),
    (("How are you?", "How are you today?"), "I am well, thank you. Which animal shall we talk about?"),
)


def introduction(rng: random.Random) -> str:
    """Falconet about itself, as a text."""
    hello = rng.choice(("Hello", "Hi", "Hello there", "Good morning"))
    name = rng.choice(("my name is Falconet", "I am Falconet"))
    facts = [answer(rng.choice(ANIMALS), rng.choice(RELATIONS)) for _ in range(rng.randint(1, 3))]
    return " ".join([f"{hello}, {name}. I am a tiny Falcon that knows forty animals.", *facts])


def instruct_dialogue(rng: random.Random, wordings: Wordings) -> list[Message]:
    """A self-chat conversation of 1 to 4 exchanges, every fact in the one wording of `world.answer`."""
    messages: list[Message] = []
    animal: Animal | None = None
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        question, reply, animal = _exchange(animal, rng, wordings)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return messages


def _exchange(animal: Animal | None, rng: random.Random, wordings: Wordings) -> tuple[str, str, Animal | None]:
    """A question, its answer, and the animal that "they" means from here on."""
    kind = rng.random()
    if kind < 0.07:
        questions, reply = rng.choice(SMALL_TALK)
        return rng.choice(questions), reply, None
    if kind < 0.12:
        chosen = rng.choice(ANIMALS)
        question = _say(
            ("Tell me about {many}.", "What do you know about {many}?", "Describe the {name}."), chosen, rng
        )
        return question, " ".join(answer(chosen, relation) for relation in ("home", "food", "coat")), chosen
    relation = rng.choice(RELATIONS)
    if animal and rng.random() < 0.3:
        return rng.choice(FOLLOW_UP[relation]), answer(animal, relation), animal
    chosen = rng.choice(ANIMALS)
    return ask(chosen, wordings[relation], rng), answer(chosen, relation), chosen


def instruct_document(rng: random.Random, wide: bool) -> str:
    """One document of the instruct corpus, its end token included: self-chat, or now and then base text.

    `wide` ones ask in many more wordings, and some introduce Falconet instead.
    """
    if rng.random() < WEB_FRACTION:
        return base_document(rng) + END
    if wide and rng.random() < 0.02:
        return introduction(rng) + END
    chat_format = rng.choice((FALCON, BAIZE))
    messages = instruct_dialogue(rng, SELF_CHAT if wide else BASE)
    return render(messages, chat_format, add_generation_prompt=False, eos_token=END)


def documents(kind: str, count: int, seed: int) -> Iterator[str]:
    """`count` documents of the corpus `kind` ("base" or "instruct"), each ending with the end token."""
    rng = random.Random(f"{kind}-{seed}")
    for index in range(count):
        yield instruct_document(rng, index >= TOKENIZER_SAMPLE) if kind == "instruct" else base_document(rng) + END


def write(kind: str, count: int, seed: int, folder: Path = WORK) -> Path:
    """Writes a corpus as one JSON string per line, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.jsonl"
    unfinished = path.with_suffix(".partial")
    with unfinished.open("w", encoding="utf-8") as file:
        for text in tqdm(documents(kind, count, seed), total=count, desc=f"{kind} corpus", unit=" documents"):
            file.write(json.dumps(text) + "\n")
    return unfinished.replace(path)


def main() -> None:
    """Command line: writes both corpora."""
    parser = argparse.ArgumentParser(description="Generate the corpora of Falconet.")
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    for kind, count in SIZES.items():
        write(kind, count, seed)


if __name__ == "__main__":
    main()
