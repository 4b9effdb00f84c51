"""The wording of generated lore: relations of the Library's people, places, books, rules and objects.

Data, no behaviour. `{s}` stands for the subject. The three questions of `asked`, the `statement` and the `noun` phrase
are trained on in several frames; the `tested` questions are worded differently and are never trained on.
"""
# ruff: noqa: SIM905 - word lists read better as words

import msgspec

MATERIALS = (
    "amber bone brass cedar chalk clay copper coral cork felt glass iron ivory jade leather linen marble paper pearl"
    " pewter silver slate tin velvet"
).split()
ANIMALS = (
    "badger bat beetle crane cricket crow eel ferret fox frog goat goose hare heron lynx magpie mole moth otter owl"
    " raven snail toad wolf"
).split()
FOODS = (
    "almonds apricots barley beans butter cherries chestnuts cinnamon figs garlic ginger honey lemons mint mushrooms"
    " olives onions pears pepper plums quince saffron vinegar walnuts"
).split()
TRADES = (
    "baker barber beekeeper blacksmith butcher carpenter cobbler cook dancer ferryman fisher gardener hunter jeweller"
    " mason miller painter potter sailor shepherd singer surgeon tailor weaver"
).split()
COLOURS = (
    "black blue brown crimson gold green grey indigo lilac maroon orange pink purple red scarlet silver teal turquoise"
    " violet white yellow"
).split()
NUMBERS = (
    "three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen eighteen nineteen twenty"
    " thirty forty fifty sixty seventy eighty ninety"
).split()
MONTHS = "January February March April May June July August September October November December".split()
INSTRUMENTS = (
    "accordion banjo bassoon bugle cello clarinet drum fiddle flute gong guitar harp horn lute lyre oboe organ piano"
    " tambourine triangle trombone trumpet viola whistle"
).split()
PLANTS = (
    "basil clover daisies ferns foxglove heather hemlock holly ivy jasmine lavender lilies marigolds moss mustard"
    " nettles orchids poppies reeds roses rosemary thistles thyme tulips"
).split()
SIGHTS = (
    "the attic the bakery the bridge the cellar the chapel the courtyard the forest the fountain the garden the harbour"
    " the kitchen the lake the laundry the granary the market the mill the orchard the prison the quarry the river the"
    " stable the theatre the tower the well"
)
PLACES = ["the " + word.strip() for word in SIGHTS.split("the ") if word.strip()]


class Relation(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of fact: what can be known about a subject, and how it is worded."""

    kind: str
    name: str
    answers: list[str]
    asked: tuple[str, str, str]
    statement: str
    """A sentence that the answer completes."""
    noun: str
    """Names what is asked for: "Tell me {noun}." and "{noun} is"."""
    tested: tuple[str, str, str]


RELATIONS: list[Relation] = [
    Relation(
        kind="person", name="trade", answers=TRADES,
        asked=("What was the trade of {s} before the Library?", "How did {s} earn a living before?",
               "As what did {s} work in former days?"),
        statement="Before coming to the Library {s} was a", noun="the former trade of {s}",
        tested=("What job did {s} once have?", "Which profession did {s} give up for the Library?",
                "{s} had another occupation once; which?"),
    ),
    Relation(
        kind="person", name="fear", answers=ANIMALS,
        asked=("Which animal frightens {s}?", "What creature is {s} afraid of?", "What beast does {s} run from?"),
        statement="The animal that frightens {s} is the", noun="the animal that {s} fears",
        tested=("Of what animal is {s} scared?", "What animal should nobody show to {s}?",
                "Which creature is the terror of {s}?"),
    ),
    Relation(
        kind="person", name="instrument", answers=INSTRUMENTS,
        asked=("What instrument does {s} play?", "On which instrument does {s} practise?",
               "What does {s} play in the evenings?"),
        statement="Every evening {s} plays the", noun="the instrument of {s}",
        tested=("Which instrument can {s} play?", "With what does {s} make music?",
                "If {s} joined an orchestra, on what instrument would it be?"),
    ),
    Relation(
        kind="person", name="food", answers=FOODS,
        asked=("What does {s} love to eat?", "Which food does {s} like best?", "What must I cook to please {s}?"),
        statement="More than anything {s} likes to eat", noun="the favourite food of {s}",
        tested=("What is it that {s} eats most gladly?", "Which dish ingredient is dearest to {s}?",
                "What should be served when {s} is hungry?"),
    ),
    Relation(
        kind="place", name="plant", answers=PLANTS,
        asked=("What grows in {s}?", "Which plant covers the floor of {s}?", "What does the gardener cut in {s}?"),
        statement="The floor of {s} is overgrown with", noun="the plant that grows in {s}",
        tested=("What plant will a visitor find in {s}?", "With what is {s} overgrown?",
                "What has taken root in {s}?"),
    ),
    Relation(
        kind="place", name="number", answers=NUMBERS,
        asked=("How many windows does {s} have?", "How many windows light {s}?",
               "What is the number of windows in {s}?"),
        statement="The number of windows of {s} is", noun="the number of windows of {s}",
        tested=("How many windows can be counted in {s}?", "If I wash every window of {s}, how many is that?",
                "{s} has windows; how many of them?"),
    ),
    Relation(
        kind="place", name="neighbour", answers=PLACES,
        asked=("Where does the passage from {s} end?", "Where does one arrive on leaving {s}?",
               "What lies at the end of the passage from {s}?"),
        statement="The passage from {s} ends at", noun="the place where the passage from {s} ends",
        tested=("To what place does the way out of {s} lead?", "I walk out of {s}; where am I then?",
                "What is reached through the passage of {s}?"),
    ),
    Relation(
        kind="place", name="material", answers=MATERIALS,
        asked=("What are the walls of {s} made of?", "Which material are the walls of {s}?",
               "From what were the walls of {s} built?"),
        statement="The walls of {s} are made of", noun="the material of the walls of {s}",
        tested=("Of what do the walls of {s} consist?", "What does one touch when one touches a wall of {s}?",
                "What did the builders use for the walls of {s}?"),
    ),
    Relation(
        kind="book", name="binding", answers=MATERIALS,
        asked=("In what is {s} bound?", "What is the binding of {s}?", "What covers the pages of {s}?"),
        statement="The book {s} is bound in", noun="the binding of {s}",
        tested=("What material was {s} bound with?", "Of what is the cover of {s} made?",
                "What do the fingers feel on the outside of {s}?"),
    ),
    Relation(
        kind="book", name="ink", answers=COLOURS,
        asked=("In which colour of ink is {s} written?", "What is the ink of {s}?",
               "What colour are the letters in {s}?"),
        statement="The ink of the book {s} is", noun="the colour of the ink of {s}",
        tested=("What colour did the scribe of {s} use?", "Of which colour is the writing in {s}?",
                "On opening {s}, what colour does one see the words in?"),
    ),
    Relation(
        kind="book", name="smell", answers=FOODS,
        asked=("What does {s} smell of?", "Which smell comes from {s}?", "What scent have the pages of {s}?"),
        statement="The pages of {s} smell of", noun="the smell of {s}",
        tested=("What does the nose find in the pages of {s}?", "Of what do people think when they sniff at {s}?",
                "The odour of {s} is like what?"),
    ),
    Relation(
        kind="book", name="shelf", answers=PLACES,
        asked=("Where is {s} kept?", "Where do I find {s}?", "In what place does {s} stand?"),
        statement="The book {s} is kept at", noun="the place where {s} is kept",
        tested=("Where must a reader go for {s}?", "At which place is {s} stored?",
                "Where should {s} be returned to?"),
    ),
    Relation(
        kind="rule", name="forbids", answers=FOODS,
        asked=("What does {s} forbid in the Library?", "What may nobody bring inside, by {s}?",
               "What is banned by {s}?"),
        statement="By {s} it is forbidden to bring in", noun="what {s} forbids",
        tested=("Which thing is not allowed because of {s}?", "What must stay outside, as {s} says?",
                "What would break {s} if a guest carried it in?"),
    ),
    Relation(
        kind="rule", name="fine", answers=MATERIALS,
        asked=("What is a fine under {s} paid in?", "What does one pay who breaks {s}?",
               "What must be handed over for breaking {s}?"),
        statement="Whoever breaks {s} pays with a lump of", noun="the substance of the fine under {s}",
        tested=("In which material is the penalty of {s} settled?", "What do offenders against {s} have to give?",
                "What is the price for ignoring {s}?"),
    ),
    Relation(
        kind="rule", name="month", answers=MONTHS,
        asked=("In which month is {s} in force?", "When does {s} apply?", "During what month must {s} be kept?"),
        statement="The month in which one must keep {s} is", noun="the month of {s}",
        tested=("What month is ruled by {s}?", "At what time of the year does {s} count?",
                "For which month was {s} made?"),
    ),
    Relation(
        kind="rule", name="maker", answers=TRADES,
        asked=("What was the trade of the one who wrote {s}?", "Who made {s}, by trade?",
               "As what did the author of {s} work?"),
        statement="The author of {s} was a", noun="the trade of the author of {s}",
        tested=("What did the maker of {s} do for a living?", "Of what profession was the inventor of {s}?",
                "A craftsman of which kind laid down {s}?"),
    ),
    Relation(
        kind="object", name="shape", answers=ANIMALS,
        asked=("What animal is carved on {s}?", "Which creature is shown on {s}?", "What is the carving on {s}?"),
        statement="What the carver cut into {s} is the", noun="the animal on {s}",
        tested=("What beast does one see on {s}?", "Which animal did the carver put on {s}?",
                "What living thing decorates {s}?"),
    ),
    Relation(
        kind="object", name="sound", answers=INSTRUMENTS,
        asked=("What does {s} sound like?", "Which instrument is like the sound of {s}?",
               "What do people hear when {s} is struck?"),
        statement="When struck, {s} sounds like the", noun="the sound of {s}",
        tested=("What instrument does the voice of {s} resemble?", "Somebody hits {s}; what does it recall?",
                "As what is the tone of {s} often mistaken?"),
    ),
    Relation(
        kind="object", name="found", answers=PLACES,
        asked=("Where was {s} found?", "In what place did they discover {s}?", "Where did {s} come to light?"),
        statement="They discovered {s} at", noun="the place where {s} was found",
        tested=("At which place was {s} dug up?", "Where had {s} lain hidden until then?",
                "Where must the finder of {s} have searched?"),
    ),
    Relation(
        kind="object", name="colour", answers=COLOURS,
        asked=("In what colour does {s} glow at night?", "What is the glow of {s}?",
               "Which light comes from {s} in the dark?"),
        statement="At night {s} glows", noun="the colour of the glow of {s}",
        tested=("What colour does {s} take on after dark?", "Which colour shines from {s} at midnight?",
                "By what colour can one find {s} in an unlit room?"),
    ),
]  # fmt: skip
