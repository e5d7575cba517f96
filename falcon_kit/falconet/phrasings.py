"""Templates of questions about an animal: two sets for training, and a held-out set whose wordings no corpus contains.

`(a|b)` is one of the two words; {one} is "a giraffe", {name} "giraffe", {many} "giraffes".
"""

import random
import re

from falcon_kit.falconet.world import Animal

BASE: dict[str, tuple[str, ...]] = {
    "food": (
        "What (do|can|will|would) {many} (eat|feed on|live on|like to eat|have for dinner)?",
        "What does {one} (eat|feed on|like to eat|need to eat|have for lunch)?",
        "What is the (food|diet|favourite food|usual food|main food|daily meal) of {one}?",
        "What (food|kind of food|sort of food) do {many} (eat|like|need|look for)?",
        "Which (food|meal|kind of food) (does {one} like|do {many} like) (best|most)?",
        "(Tell me|Explain|I want to know|Can you tell me|Do you know) what {many} (eat|feed on|have for dinner).",
        "(Tell me|Explain|I would like to know|Say) what {one} (eats|feeds on|likes to eat).",
        "(Name|Describe|Tell me) the (food|diet|usual food|favourite food) of {many}.",
        "What should I (feed|give to eat to|cook for|give for dinner to) {one}?",
        "What do people (feed to|give as food to) {many}?",
        "{many}: what do they eat?",
        "(How do|With what do) {many} (fill their bellies|feed themselves)?",
        "What is on the (menu|plate) of {one}?",
        "What would a hungry {name} (eat|look for|want)?",
        "If {one} is hungry, what does it (eat|want|look for)?",
        "About {many}: which food do they (eat|like)?",
    ),
    "home": (
        "Where (do|can|will|would) {many} (live|sleep|stay|make their home|have their home)?",
        "Where does {one} (live|sleep|stay|make its home|feel at home)?",
        "Where can (I|we|you|one) (find|see|meet|look for) {one}?",
        "What is the (home|habitat|usual home|natural home|living place) of {one}?",
        "(Tell me|Explain|I want to know|Can you tell me|Do you know) where {many} (live|sleep|make their home).",
        "(Tell me|Explain|I would like to know|Say) where {one} (lives|sleeps|has its home).",
        "(Name|Describe|Tell me) the (home|habitat|natural home|living place) of {many}.",
        "In which (place|habitat|kind of place|landscape) (does {one}|do {many}) live?",
        "What (kind of home|kind of place|sort of place|habitat) do {many} (have|like|need)?",
        "{many}: where do they live?",
        "Where should I (look|go|wait) to (see|meet|find) {many}?",
        "Which (place|habitat) is home to {many}?",
        "Where is the home of {one}?",
        "If I look for {one}, where (should I go|is its home|does it live)?",
        "About {many}: where is their (home|habitat)?",
        "At night, where (does {one}|do {many}) (sleep|stay)?",
    ),
    "continent": (
        "(Which|What) continent (do {many}|does {one}) come from?",
        "On (which|what) continent do {many} (live|occur|grow up)?",
        "From (which|what) (continent|part of the world) (does {one}|do {many}) come?",
        "What is the (continent|home continent|part of the world) of {one}?",
        "(Tell me|I want to know|Can you tell me|Do you know) which continent {many} come from.",
        "(Tell me|Explain|I would like to know|Say) from which (continent|part of the world) {one} comes.",
        "(Name|Tell me) the (continent|home continent) of {many}.",
        "In which part of the world (do {many}|does {one}) (live|occur)?",
        "To which continent must I (travel|fly|go) to (see|find) {many}?",
        "{many}: which continent?",
        "Which part of the world is home to {many}?",
        "Which continent is the home of {one}?",
        "Where in the world (do {many}|does {one}) come from?",
        "If I look for {one} on a map of the world, which continent is it?",
        "About {many}: which continent are they from?",
        "Where on the map of the world are {many}?",
    ),
    "young": (
        "What (do you|do we|do people) call (a baby|a young|a newborn|a little) {name}?",
        "What is (a baby|a young|a newborn|a little) {name} called?",
        "What is the (name|word|right word|special name) for (a baby|a young|a newborn) {name}?",
        "How (do you|do we|do people) call the (baby|child|young) of {one}?",
        "(Tell me|I want to know|Can you tell me|Do you know) what (a baby|a young) {name} is called.",
        "(Tell me|Explain|I would like to know|Say) how the (baby|child|young) of {one} is called.",
        "(Name|Tell me) the (word|name) for (a baby|a newborn) {name}.",
        "Which (word|name) do people use for (a baby|a young|a newborn) {name}?",
        "What are (baby|young|newborn|little) {many} called?",
        "{many}: what are their babies called?",
        "What name do the babies of {many} have?",
        "By which name do we know (a baby|a young) {name}?",
        "When {one} has a baby, what is the baby called?",
        "If {one} is very young, what (do we call it|is it called)?",
        "About {many}: what is their (baby|child) called?",
        "A (newborn|little) {name} has a special name, what is it?",
    ),
    "group": (
        "What (do you|do we|do people) call (a group|many|a crowd) of {many}?",
        "What is a (group|crowd|big group|family group) of {many} called?",
        "What is the (name|word|right word|special name) for a (group|crowd) of {many}?",
        "How (do you|do we|do people) call {many} (in a group|when they are together)?",
        "(Tell me|I want to know|Can you tell me|Do you know) what a (group|crowd) of {many} is called.",
        "(Tell me|Explain|I would like to know|Say) how a group of {many} is called.",
        "(Name|Tell me) the (word|name) for a (group|crowd) of {many}.",
        "Which (word|name) do people use for a (group|crowd) of {many}?",
        "What are many {many} together called?",
        "{many}: what is a group of them called?",
        "What name does a (group|crowd) of {many} have?",
        "By which name do we know a group of {many}?",
        "When many {many} meet, what is the group called?",
        "If I see ten {many} together, what (do I call them|are they called)?",
        "About {many}: what is their group called?",
        "A (group|crowd) of {many} has a special name, what is it?",
    ),
    "coat": (
        "What (does {one}|do {many}) look like?",
        "How (does {one}|do {many}) look?",
        "What (colour is {one}|colour are {many}|colours does {one} have)?",
        "What is the (look|colour|coat|appearance) of {one}?",
        "(Tell me|Explain|I want to know|Can you tell me|Do you know) what {many} look like.",
        "(Tell me|Explain|I would like to know|Say) how {one} looks.",
        "(Name|Describe|Tell me) the (look|colour|coat|appearance) of {one}.",
        "What (kind of|sort of) (coat|skin|colour|look) (does {one}|do {many}) have?",
        "(Which|What) colour is the (coat|skin) of {one}?",
        "{many}: how do they look?",
        "How can I (know|spot|recognise) {one} by its (look|colour|coat)?",
        "By which (look|colour|coat) do people (know|recognise) {one}?",
        "If I want to (draw|paint) {one}, what does it look like?",
        "When I see {one}, what does it look like?",
        "About {many}: what is their (look|colour|appearance)?",
        "Which (colours|colour) do I need to (draw|paint) {one}?",
    ),
    "years": (
        "How long (does {one}|do {many}) live?",
        "How (many years|long) can {one} live?",
        "How old (does {one}|do {many}) (get|become|grow)?",
        "What is the (age|usual age|life span|length of life) of {one}?",
        "(Tell me|I want to know|Can you tell me|Do you know) how long {many} live.",
        "(Tell me|Explain|I would like to know|Say) how (old {one} gets|many years {one} lives).",
        "(Name|Tell me) the (age|usual age|life span) of {many}.",
        "For how (long|many years) (does {one}|do {many}) live?",
        "(To|Up to) (which|what) age (does {one}|do {many}) live?",
        "{many}: how old do they get?",
        "How many years (does {one}|do {many}) have to live?",
        "Which age (does {one}|do {many}) (reach|get to)?",
        "If {one} is born today, how long will it live?",
        "When {one} is born, how many years does it have?",
        "About {many}: how long do they live?",
        "How many (birthdays|summers) (does {one}|do {many}) (see|have)?",
    ),
}

_FRAMES = (
    "(Please|Kindly) (tell me|say|name|describe|explain) {topic}.",
    "(Can|Could|Would) you (please |)(tell me|name|describe|explain) {topic}?",
    "(Let me know|Give me|Write down|Show me|Find out) {topic}.",
    "(I wonder|I ask myself|I forgot|I am not sure) about {topic}.",
    "(I need|I am looking for|I want to learn|I have to know) {topic}.",
    "My (question|homework) is (about |)(this: |){topic}.",
    "What (can you say|do you know) about {topic}?",
    "In general, (what is|tell me) (this: |){topic}?",
    "{topic}, (please|if you can|what is it)?",
)
_TOPICS: dict[str, tuple[str, ...]] = {
    "food": (
        "the (food|diet|meal|dinner) of {one}",
        "what {many} (eat|feed on|have for lunch)",
        "the (things|food) that {many} eat",
        "what {one} feeds on",
        "the (usual|favourite|main) (meal|food) of {many}",
    ),
    "home": (
        "the (home|habitat) of {one}",
        "the spot where {many} (live|sleep|stay)",
        "where {many} (live|sleep|stay|make their home)",
        "the kind of (place|habitat) that {one} likes",
        "where (to find|I can see|I can meet) {one}",
    ),
    "continent": (
        "the (continent|home continent) of {many}",
        "which continent {many} (are|come) from",
        "the part of the world that {many} come from",
        "the continent that {one} is from",
        "on which continent (to look for|I find) {many}",
    ),
    "young": (
        "the (name|word) of a (baby|little) {name}",
        "what a (young|newborn) {name} is called",
        "the (word|special name) for the babies of {many}",
        "how to call a (newborn|young|little) {name}",
        "the right name for the child of {one}",
    ),
    "group": (
        "the name of a (group|crowd) of {many}",
        "the (word|special name) for many {many} together",
        "how to call a (crowd|group) of {many}",
        "what {many} in a (group|crowd) are called",
        "the right name for a group of {many}",
    ),
    "coat": (
        "the (look|coat|colour) of {one}",
        "the (appearance|look) of {many}",
        "the (colours|appearance) of {one}",
        "how {many} look",
        "what {many} look like",
    ),
    "years": (
        "the (age|life span) of {one}",
        "the (usual age|length of life) of {many}",
        "how many years {many} live",
        "the number of years in the life of {one}",
        "how (old {many} get|long the life of {one} is)",
    ),
}
_MORE: dict[str, tuple[str, ...]] = {
    "food": ("What would you (feed|give) {one}?", "When {one} is hungry, what (is|would be) the right food?"),
    "home": ("Where (would|will) I (see|meet) {many}?", "When {one} sleeps, where is (it|that)?"),
    "continent": (
        "On (which|what) continent (can|could|do) (I|you|we|people) (meet|find|see|spot) {many}?",
        "To see {one}, which continent should I (visit|travel to)?",
        "On (a|the) map, which continent has {many}?",
    ),
    "young": (
        "Which word is used (when|if) {one} is (a baby|newborn)?",
        "I (found|met) a baby {name}, what is it called?",
    ),
    "group": (
        "Which word is used (when|if) {many} are (in a group|together)?",
        "I (found|met) many {many}, what is the group called?",
    ),
    "coat": (
        "What (appearance|look|colours) (do {many}|does {one}) have?",
        "What would (you|people) say {one} looks like?",
    ),
    "years": (
        "How (long|many years) is the life (span |)of {one}?",
        "What is the number of years {many} (can|may) live?",
    ),
}
SELF_CHAT = {
    relation: (
        *BASE[relation],
        *_MORE[relation],
        *(frame.replace("{topic}", topic) for frame in _FRAMES for topic in _TOPICS[relation]),
    )
    for relation in BASE
}
"""The questions of the self-chat: more wordings than in the base corpus, so that the model learns to answer unseen ones."""

HELD_OUT: dict[str, tuple[str, ...]] = {
    "food": (
        "What kind of food would {one} like to have?",
        "Do you know the favourite food of {many}?",
        "I want to feed {one}, so which food does it need?",
        "Please name what {one} likes to have for dinner.",
        "When {many} are hungry, what do they eat?",
        "What does the diet of {one} look like in general, what does it eat?",
    ),
    "home": (
        "I want to see {one}, where does it live?",
        "Do you know the natural habitat of {many}?",
        "Which place do {many} call their home?",
        "Please name the place where {one} lives.",
        "When {many} sleep, where do they stay?",
        "What kind of habitat does {one} live in?",
    ),
    "continent": (
        "I want to see {one}, to which continent must I go?",
        "Do you know the home continent of {many}?",
        "Which continent do I have to visit to see {many}?",
        "Please name the continent where {one} comes from.",
        "What part of the world does {one} come from?",
        "On which continent of the world map can I see {many}?",
    ),
    "young": (
        "I saw a newborn {name}, how is it called?",
        "Do you know the special name for a young {name}?",
        "What word do we use for the baby of {one}?",
        "Please name the right word for a little {name}.",
        "When {many} have a baby, how do we call it?",
        "By what name is a baby {name} known?",
    ),
    "group": (
        "I saw a crowd of {many}, how is it called?",
        "Do you know the special name for a group of {many}?",
        "What word do we use when many {many} are together?",
        "Please name the right word for a crowd of {many}.",
        "When {many} are in a group, how do we call them?",
        "By what name is a group of {many} known?",
    ),
    "coat": (
        "I want to draw {one}, how does it look?",
        "Do you know the colour of {one}?",
        "What kind of appearance would one say {many} have?",
        "Please describe what {one} looks like.",
        "When you see {many}, how do they look?",
        "By what colour can we recognise {one}?",
    ),
    "years": (
        "I have {one}, how old will it get?",
        "Do you know the usual age of {many}?",
        "What age does {one} get to?",
        "Please name the number of years that {one} lives.",
        "When {one} is born today, how old can it become?",
        "How many years long is the life of {one}?",
    ),
}

OPENERS = ("", "", "", "", "", "Hello! ", "Please tell me: ", "Hi! ", "Quick question: ", "I have a question. ")

_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")


def phrase(template: str, animal: Animal, rng: random.Random) -> str:
    """One wording of `template` about `animal`: alternatives drawn by `rng`, first letter capitalised."""
    chosen = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    text = chosen.format(one=animal.one, name=animal.name, many=animal.plural)
    return text[0].upper() + text[1:]


def ask(animal: Animal, templates: tuple[str, ...], rng: random.Random) -> str:
    """A question from one of `templates`, in half of the cases after an opener such as "Hello! "."""
    return rng.choice(OPENERS) + phrase(rng.choice(templates), animal, rng)
