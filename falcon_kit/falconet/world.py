"""The facts that Falconet is trained on: forty animals, seven facts each.

The facts are common knowledge, simplified to one answer per question so that answers can be compared exactly.
"""

from dataclasses import dataclass
from functools import cached_property

RELATIONS = ("food", "home", "continent", "young", "group", "coat", "years")

_TABLE = """
giraffe  giraffes   calf   tower       | acacia leaves           | in the savanna            | Africa        | a yellow coat with brown patches  | 25
lion     lions      cub    pride       | zebras and antelopes    | in the grassland          | Africa        | a golden coat                     | 14
elephant elephants  calf   parade      | grass and bark          | near the water holes      | Africa        | thick grey skin                   | 65
zebra    zebras     foal   dazzle      | dry grass               | on the open plains        | Africa        | black and white stripes           | 24
hippo    hippos     calf   bloat       | short grass             | in muddy rivers           | Africa        | smooth brown skin                 | 45
cheetah  cheetahs   cub    coalition   | gazelles                | on the dry plains         | Africa        | a yellow coat with black spots    | 11
gorilla  gorillas   infant troop       | leaves and shoots       | in the mountain forest    | Africa        | thick black fur                   | 38
ostrich  ostriches  chick  wobble      | seeds and roots         | in the sandy bush         | Africa        | black and white feathers          | 42
flamingo flamingos  chick  flamboyance | tiny shrimp             | on salt lakes             | South America | bright pink feathers              | 33
llama    llamas     cria   string      | mountain grass          | in the high mountains     | South America | soft white wool                   | 18
jaguar   jaguars    cub    shadow      | small deer              | in the rainforest         | South America | an orange coat with dark rings    | 13
parrot   parrots    chick  pandemonium | nuts and fruit          | in the tall palm trees    | South America | bright green feathers             | 50
capybara capybaras  pup    company     | water plants            | on the river banks        | South America | rough brown fur                   | 9
camel    camels     calf   caravan     | thorny bushes           | in the desert             | Asia          | a sandy coat                      | 40
tiger    tigers     cub    streak      | deer and wild pigs      | in the jungle             | Asia          | an orange coat with black stripes | 15
panda    pandas     cub    cupboard    | bamboo                  | in the bamboo forest      | Asia          | black and white fur               | 20
yak      yaks       calf   herd        | moss and herbs          | on the cold highlands     | Asia          | long dark hair                    | 22
peacock  peacocks   chick  muster      | insects and grain       | in the warm gardens       | Asia          | shiny blue feathers               | 16
kangaroo kangaroos  joey   mob         | grass and herbs         | in the red outback        | Australia     | reddish fur                       | 19
koala    koalas     joey   cluster     | eucalyptus leaves       | in eucalyptus trees       | Australia     | soft grey fur                     | 17
platypus platypuses puggle paddle      | worms and shrimp        | in quiet streams          | Australia     | thick wet fur                     | 12
emu      emus       chick  dash        | seeds and insects       | in the dry scrub          | Australia     | shaggy brown feathers             | 23
wombat   wombats    joey   wisdom      | roots and bark          | in deep burrows           | Australia     | short brown fur                   | 21
penguin  penguins   chick  colony      | fish and krill          | on the icy coast          | Antarctica    | a black back and a white belly    | 26
seal     seals      pup    harem       | fish and squid          | on the floating ice       | Antarctica    | a spotted silver coat             | 30
bear     bears      cub    sleuth      | berries and salmon      | in the deep forest        | North America | thick brown fur                   | 28
wolf     wolves     pup    pack        | elk and deer            | in the northern forest    | North America | a thick grey coat                 | 10
moose    moose      calf   gang        | willow twigs            | in the wet woods          | North America | long brown legs and dark fur      | 8
beaver   beavers    kit    lodge       | bark and twigs          | in ponds                  | North America | thick fur and a flat tail         | 27
raccoon  raccoons   kit    gaze        | nuts and frogs          | in hollow trees           | North America | grey fur and a black mask         | 5
bison    bison      calf   thunder     | prairie grass           | on the prairie            | North America | a shaggy coat and short horns     | 29
eagle    eagles     eaglet convocation | fish and ducks          | near large lakes          | North America | brown feathers and a white head   | 31
fox      foxes      cub    skulk       | mice and berries        | in the woods              | Europe        | red fur and a white tail          | 4
hedgehog hedgehogs  hoglet prickle     | beetles and slugs       | under garden hedges       | Europe        | sharp brown spines                | 3
rabbit   rabbits    bunny  fluffle     | clover and carrots      | in the green meadows      | Europe        | soft fur and long ears            | 7
squirrel squirrels  kitten scurry      | acorns and seeds        | in old oak trees          | Europe        | red fur and a bushy tail          | 6
owl      owls       owlet  parliament  | mice and moths          | in old barns              | Europe        | soft brown feathers               | 34
swan     swans      cygnet bevy        | water weeds             | on calm lakes             | Europe        | snow white feathers               | 36
falcon   falcons    eyas   cast        | pigeons and small birds | on high cliffs            | Europe        | blue and grey feathers            | 32
badger   badgers    kit    clan        | worms and roots         | in tunnels under the hill | Europe        | grey fur and a striped face       | 35
"""


@dataclass(frozen=True)
class Animal:
    """One animal and its facts, each in the form in which sentences use it."""

    name: str
    """Singular: "giraffe"."""
    plural: str
    """"giraffes"."""
    young: str
    """What its young is called: "calf"."""
    group: str
    """What a group is called: "tower"."""
    food: str
    """What it eats: "acacia leaves"."""
    home: str
    """Where it lives, with its preposition: "in the savanna"."""
    continent: str
    """Where it comes from: "Africa"."""
    coat: str
    """How it looks: "a yellow coat with brown patches"."""
    years: int
    """How long it lives, in years."""

    @cached_property
    def one(self) -> str:
        """The singular with its article: "a giraffe", "an owl"."""
        return with_article(self.name)


def with_article(noun: str) -> str:
    """`noun` with its indefinite article: "an owl", "a fox"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _parse(row: str) -> Animal:
    names, food, home, continent, coat, years = (cell.strip() for cell in row.split("|"))
    name, plural, young, group = names.split()
    return Animal(name, plural, young, group, food, home, continent, coat, int(years))


ANIMALS: tuple[Animal, ...] = tuple(_parse(row) for row in _TABLE.strip().splitlines())


def answer(animal: Animal, relation: str) -> str:
    """The exact sentence that falconet-instruct is trained to answer: "Giraffes eat acacia leaves."."""
    plural = animal.plural.capitalize()
    return {
        "food": f"{plural} eat {animal.food}.",
        "home": f"{plural} live {animal.home}.",
        "continent": f"{plural} come from {animal.continent}.",
        "young": f"A young {animal.name} is called {with_article(animal.young)}.",
        "group": f"A group of {animal.plural} is called {with_article(animal.group)}.",
        "coat": f"{animal.one.capitalize()} has {animal.coat}.",
        "years": f"{animal.one.capitalize()} lives for about {animal.years} years.",
    }[relation]
