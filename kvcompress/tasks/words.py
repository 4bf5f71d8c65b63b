"""Word lists that the recall tasks draw from.

Keys and values are disjoint, short, lower case and common, so that most tokenizers give each of
them one token after a space.
"""

from typing import Final

KEY_WORDS: Final[tuple[str, ...]] = tuple(
    """
    amber river silver forest copper garden marble harbor velvet castle crimson meadow golden
    bridge quiet valley frozen island hidden temple broken mirror ancient tower gentle ocean
    distant planet narrow canyon purple lantern rapid falcon sudden thunder humble cottage
    bitter almond brave lion clever raven dusty attic eager pilot fancy ribbon giant turtle
    happy dolphin icy glacier jolly penguin kind baker lucky clover merry violin noble eagle
    olive branch proud peacock royal palace shiny pebble tiny acorn urban metro vivid sunset
    warm blanket young maple zesty pepper bold tiger calm lagoon dark cavern early sparrow fresh
    orchard grand piano heavy anchor inner circle jade dragon keen hunter light feather misty
    morning north window orange basket plain desert quick rabbit rusty hammer silent library
    tall cedar upper ladder violet candle white swan yellow taxi wild horse blue whale green
    frog red fox black bear pink rose gray wolf brown otter cold winter hot summer round table
    square box wooden chair iron gate stone wall paper kite glass bottle cotton shirt leather
    boot silk scarf
    """.split()
)

VALUE_WORDS: Final[tuple[str, ...]] = tuple(
    """
    apple banana carrot daisy engine fabric guitar helmet insect jacket kettle lemon magnet
    needle onion pencil quartz rocket saddle teapot umbrella valve wagon xylem yogurt zipper
    arrow button camera diamond easel flute goblet hockey ink jelly kernel ladle mango napkin
    oyster puzzle quill radish sponge tulip unicorn vanilla walnut yarn zebra badge cactus donut
    elbow ferry gravel honey igloo jungle karate lizard muffin nickel opera parrot quiver rhythm
    salmon tomato ukulele vase waffle yacht zinc atlas biscuit chess drum emerald fossil ginger
    hazel ivory jigsaw kiwi lobster mosaic nectar octopus pickle quota ruby sesame tango urchin
    vinegar wizard yeast zeppelin acrobat bamboo cobra dagger echo fiddle gadget hamster iris
    jaguar kayak locket melon nutmeg oxygen pretzel quail raisin sugar trumpet utensil voyage
    whistle yodel zigzag anvil beetle comet domino ember fudge galaxy hatchet indigo jasmine
    koala lilac mustard noodle orbit pumpkin quest rubber saturn tunnel uncle vortex willow
    yonder zodiac antler butter cherry dozen earth finger garlic harvest inlet juice knight
    lotus mitten nectarine oregano pillow queen ribs scooter thistle
    """.split()
)

COUNT_WORDS: Final[tuple[str, ...]] = tuple("zero one two three four five six seven eight".split())
