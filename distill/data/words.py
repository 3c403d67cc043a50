"""Words for generated text, and the draws of names, phrases and literals from them."""

from collections.abc import Sequence
from random import Random
from typing import TypeVar

Item = TypeVar("Item")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    """
    acorn album alcove amber anchor anthem anvil apron arch arena armor atlas attic awning axle badge bakery
    balcony ballad banner barge barrel basin basket bazaar beacon beam bench berry blade blanket blossom bonfire
    booth border bottle boulder bouquet branch breeze brick bridle brook broom bucket buckle bugle bundle bunker
    burrow cabin cable cactus camel canal candle canoe canvas canyon cape caravan cargo carpet cart castle
    cavern cedar cellar chalk chamber chapel chariot chart chest chimney chisel cider circus citadel cliff cloak
    clover cobalt coin comet compass copper coral cork corridor cottage cotton couch courier crane crate creek
    crest cricket crown crystal curtain cushion dagger dairy dam dawn delta desert diamond dock dome dragon
    drawer drum dune eagle easel echo elm ember engine envelope estate falcon feast feather fence fern ferry
    fiddle flag flame flask fleece flint flute foam forge fossil fountain fox frost galaxy garden garnet gate
    gazebo geyser ginger glacier glade globe glove goblet gondola gorge granite grape gravel grove guild guitar
    gull hammer hammock harbor harness harp harvest hatch hawk hazel hearth hedge helmet herb heron hollow honey
    horizon hornet island ivory ivy jacket jasmine jetty jewel jungle juniper kennel kettle kiln kite ladder
    lagoon lantern larch lattice laurel lavender ledge legend lemon lichen lily linen lobster locket lodge loom
    lotus magnet mallet mansion mantle maple marble marina marsh mast meadow melon meteor mill mirror mitten
    moat mole monsoon moss mural nectar needle nest nickel nook nutmeg oak oar oasis obelisk ocean olive onyx
    opal orchard orchid otter oven owl oyster paddle pagoda palace pantry parcel parrot pasture patio pavilion
    pearl pebble pepper petal phoenix piano pier pigeon pillar pillow pine plank plateau plaza plum pollen pond
    poppy porch portrait pottery prairie prism pulley pumpkin quarry quartz quill quilt rabbit raft rail ranch
    raven reef ribbon ridge river robin rocket rope ruby rudder saddle saffron sail salmon sandal sapphire
    satchel sauna scarf schooner scroll shed shell shield shovel shrine silo sleigh slope sparrow spindle spruce
    squid stable statue steeple stork stove studio sundial swan tapestry teapot temple terrace thicket thistle
    throne thunder tiger timber toad topaz torch tower trail trellis trumpet tulip tundra tunnel turret valley
    vase vault velvet veranda village vineyard violin volcano wagon walnut walrus waterfall weasel wharf wheat
    whistle willow windmill wolf wreath yacht zebra
    """
)
ADJECTIVES = _words(
    """
    agile ancient arctic azure bold brave brief bright brisk broad bronze calm careful clever cloudy coarse cold
    cosmic crimson crisp curious curved damp daring dark deep distant dusty eager early elder exact faint fancy
    fierce floral fresh frozen gentle gilded glad golden grand grave green grim hardy hasty heavy hidden hollow
    humble idle inner jolly keen kind large late lazy lively lonely loud lucky lunar mellow merry mighty mild
    misty modest narrow neat nimble noble northern odd old outer pale patient plain polar polite proud pure
    quick quiet rapid rare remote rich rough round royal rural rustic sacred scarlet secret shaded sharp shiny
    silent silver simple sleepy slim slow smooth solar solid southern spare stark steady steep stern still
    stormy strange strong subtle sudden sunny swift tall tame tender thick thin tidy tiny tough tranquil urban
    vacant vast vivid warm western wild windy wise witty young
    """
)
VERBS = _words(
    """
    adjust admit align arrange assemble attach balance blend borrow bounce brush carry carve catch chase climb
    combine compare convert cook cover crush decorate deliver descend divide donate drain draw drift drop
    explore extend fasten feed ferry fetch fill finish fix float fold follow forward gather glide glue grab
    greet grind guard guide handle hang harvest heal heat hide hoist hover hunt inspect inspire invite juggle
    jump kindle knit knock label launch lead lean lend lift light limit listen lower mark measure melt mend
    merge mix mount move notice observe offer pack paint parade patch pave peel place plant play polish pour
    praise press protect prune pull push quench reach rebuild recall refill release remind repair rescue rest
    restore reveal rinse rotate sample scan scatter season select separate settle shake shape share sharpen
    shelter shift shine sift signal sketch slice solve sort spill spin spread stack steer stir store stretch
    sweep switch teach tie toss trace trade travel trim turn twist uncover unlock unpack visit wake wander wash
    watch water weave weigh whisper widen wrap
    """
)
WORDS = _words(
    """
    about above across after again alone along among any apart around away back before behind below beneath
    beside better between beyond both bring by carefully clearly closed coming crowded daily done down during
    each eight either else empty enough even evening ever every failed far few five forever four full gone good
    half happy hard here high home hundred inside invalid just least less long lost many maybe middle missing
    month more morning most much near nearly never new next nine noon nothing now off often okay once only other
    over past perhaps please quite rarely safe same saved seven several short since six small some soon sorry
    sound started stopped such ten thanks that then there third this three through time today together tomorrow
    tonight too toward true twice under until up upon usual very wait week welcome well whole why winter with
    within without wrong year yesterday yet you apple autumn bread butter cheese cherry cloud coffee cream
    dinner family farm fire floor flower forest friend glass grass house juice kitchen lake leaf letter lunch
    market milk moon mother mountain music night paper party people pocket rain road room salt school sea sheep
    ship shoe shop sky snow soup spring star station stone storm story street sugar summer sun tea thing ticket
    tree wall weather wind window wood world
    """
)


class Draws:
    """Random choices from one stream, with a style (its share of single quotes) fixed for the whole stream."""

    def __init__(self, rng: Random) -> None:
        self.random = rng.random
        self.single_share = self.pick((0.1, 0.5, 0.5, 0.5, 0.9))

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(self.random() * len(items))]

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def between(self, low: int, high: int) -> int:
        """Whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def new_name(self) -> str:
        kind = self.random()
        if kind < 0.6:
            return self.pick(NOUNS)
        if kind < 0.85:
            return f"{self.pick(ADJECTIVES)}_{self.pick(NOUNS)}"
        if kind < 0.95:
            return f"{self.pick(NOUNS)}_{self.pick(NOUNS)}"
        return f"{self.pick(NOUNS)}{self.between(1, 9)}"

    def new_names(self, number: int) -> list[str]:
        """Distinct names: parameters and keywords must not repeat."""
        names: dict[str, None] = {}
        while len(names) < number:
            names[self.new_name()] = None
        return list(names)

    def verb(self) -> str:
        verb = self.pick(VERBS)
        return verb if self.random() < 0.5 else f"{verb}_{self.pick(NOUNS)}"

    def quote(self) -> str:
        return "'" if self.random() < self.single_share else '"'

    def phrase(self, longest: int = 5) -> str:
        words = [self.pick(WORDS if self.random() < 0.7 else NOUNS) for _ in range(self.between(1, longest))]
        return " ".join(words)

    def quoted(self, longest: int = 4) -> str:
        quote = self.quote()
        end = self.pick(("", "", "", "", ".", "!", "?"))
        return f"{quote}{self.phrase(longest)}{end}{quote}"

    def quoted_word(self) -> str:
        quote = self.quote()
        return f"{quote}{self.pick(WORDS if self.random() < 0.7 else NOUNS)}{quote}"

    def number(self) -> str:
        return str(self.between(0, 9) if self.random() < 0.6 else self.between(10, 999))
