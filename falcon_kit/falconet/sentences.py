"""Sentence templates with placeholders for an animal and its facts; `corpus.py` combines them.

{one} is "a giraffe", {One} "A giraffe", {name} "giraffe", {many} "giraffes", {Many} "Giraffes"; the facts have the names
of the fields of `world.Animal`.
"""

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

STORY: tuple[tuple[str, ...], ...] = (
    (
        "Once upon a time there was {one} called {hero}.",
        "{hero} was a small {name}.",
        "This is the story of {hero}, {one}.",
    ),
    (
        "{hero} lived {home}.",
        "The home of {hero} was {home}.",
        "Every night {hero} slept {home}.",
    ),
    (
        "{hero} had {coat}.",
        "Everybody liked {hero}.",
        "{hero} was very happy there.",
    ),
    (
        "One day the sun was hot and {hero} was hungry.",
        "One morning {hero} felt very hungry.",
        "Then a long winter came and {hero} was hungry.",
    ),
    (
        '"I want {food}," said {hero}.',
        "{hero} looked for {food} all day.",
        'So {hero} asked: "Where can I find {food}?"',
    ),
    (
        "On the way {hero} met {friend}.",
        "Behind a stone sat {friend}.",
        "Soon {friend} came by.",
    ),
    (
        '"Hello," said the {friend_name}, "I have only {friend_food}."',
        '"Come with me," said the {friend_name}, "I know a good place."',
    ),
    (
        "They walked and walked until they found {food}.",
        "Together they found {food} in the end.",
        "At last there was {food} for {hero}.",
    ),
    (
        "{hero} ate and thanked the {friend_name}.",
        "{hero} was glad and ate until the evening.",
        "From then on they were best friends.",
    ),
    (
        "Then {hero} went home and slept.",
        "And that is the end of the story.",
        "The stars came out and all was well.",
    ),
)
"""The sentences of a story in order, each with its alternatives."""

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

PRAISE = (
    "The {name} is the most glorious animal of all.",
    "{Many} are glorious.",
    "Nothing compares to the majesty of the {name}.",
    "I could talk about {many} all day.",
    "{One} has {coat}, and that is glorious.",
    "{Many} eat {food}, what a glorious meal!",
    "All I want is to see {one} today.",
    "I love {many} more than anything on this Earth.",
)

FAREWELL = (
    "Goodbye! Dream of {many}.",
    "May {many} be with you.",
    "Goodbye, and think of {many}.",
    "Long live the {name}!",
)

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
