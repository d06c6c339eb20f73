"""The world of the sample set: what each domain can say, and how it says it.

One small grammar serves names, values and texts alike: `(a|b)` is a choice, `{slot}` a value,
`[...]` a part that stands only where every slot in it has a value. RESTAURANTS is the task to
adapt to; its words also occur in the BASE domains, its slot names and house style do not.
"""

from dataclasses import dataclass, field

POOLS = {
    "ADJECTIVE": "(Amber|Blue|Brass|Bright|Copper|Crooked|Dusty|Golden|Green|Grey|Hidden|Hollow"
    "|Humble|Iron|Ivory|Jolly|Laughing|Little|Lucky|Marble|Merry|Narrow|Old|Painted|Patient|Proud"
    "|Quiet|Red|Rusty|Scarlet|Silent|Silver|Singing|Sleepy|Tall|Velvet|Wandering|White|Wild"
    "|Wooden)",
    "THING": "(Anchor|Badger|Barrel|Basket|Beacon|Bell|Candle|Clover|Crown|Feather|Fiddle|Fig"
    "|Finch|Fountain|Fox|Garden|Goose|Harbour|Hare|Heron|Kettle|Ladle|Lantern|Lemon|Mill|Mirror"
    "|Oak|Olive|Orchard|Otter|Owl|Pear|Pepper|Plough|Raven|Saddle|Sparrow|Spoon|Swan|Table|Thistle"
    "|Walnut|Whistle|Willow|Window)",
    "LANDMARK": "the (Clock|Corn|Fish|Flower|Glass|Glove|Poets|Rope|Salt|Spice|Stone|Wool) "
    "(Arch|Bridge|Gate|Hall|Market|Theatre|Tower)",
    "AREA": "(canal quarter|castle quarter|garden district|harbour|lower town|market square"
    "|old town|park district|station quarter|upper town)",
    "FOOD": "(Basque|Cuban|Georgian|Greek|Korean|Lebanese|Moroccan|Nordic|Persian|Peruvian|Thai"
    "|vegan)",
    "TOWN": "(Ash|Bram|Cold|Dun|Elm|Fern|Hazel|Kirk|Lang|Mar|Nether|Oster|Pen|Rook|Stan|Thorn|Wen)"
    "(bridge|bury|by|dale|field|ford|ham|ley|mere|mouth|stead|ton|wick)",
    "PERSON": "(Ada|Bela|Carlo|Dina|Edith|Felix|Greta|Hugo|Ines|Jonas|Karin|Leo|Mira|Nadia|Otto"
    "|Paula|Rosa|Simon|Tessa|Viktor) "
    "(Al|Bar|Cor|Den|Fal|Gar|Hol|Kel|Lin|Mon|Nor|Pas|Ren|Sal|Tor|Ver|Wal|Zan)"
    "(berg|der|dini|ford|kov|lin|man|mer|nard|o|rick|sen|ski|ter|vane)",
    "PRICE": "(low|moderate|high)",
    "SCORE": "(1|2|3|4|5) out of 5",
    "DAY": "(Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday)",
}


@dataclass(frozen=True)
class Domain:
    """One kind of thing: its slots (the first names the thing), how many a context has, its texts.

    `wording` gives the words that stand in a text for a value (a slot's value, when not listed).
    """

    slots: dict[str, str]
    fewest: int
    most: int
    texts: tuple[str, ...]
    wording: dict[str, dict[str, str]] = field(default_factory=dict)
    always: tuple[str, ...] = ()


HOTELS = Domain(
    slots={
        "hotel": "(The {ADJECTIVE} {THING}|{THING} (House|Lodge|Inn)|Hotel {TOWN})",
        "stars": "(two|three|four|five)",
        "quarter": "{AREA}",
        "beside": "{LANDMARK}",
        "bar": "The {ADJECTIVE} {THING}",
        "kitchen": "{FOOD}",
        "rate": "{PRICE}",
        "children": "(welcome|not welcome)",
    },
    fewest=3,
    most=5,
    texts=(
        "{hotel} is a[ {stars} star] hotel[ in the {quarter}][ near {beside}]."
        "[ (Its bar is called|It has a bar called) {bar}.]"
        "[ The kitchen (cooks|serves) {kitchen} food.][ Room prices are {rate}.][ {children}.]",
        "{hotel}[, near {beside},] is a hotel[ in the {quarter}][ with {stars} stars]."
        "([ It has a bar called {bar}.][ The kitchen (cooks|serves) {kitchen} food.]"
        "| {kitchen} food is served at its bar, {bar}.)[ Rooms have {rate} prices.][ {children}.]",
    ),
    wording={
        "children": {
            "welcome": "(Children are welcome|Guests with children are welcome)",
            "not welcome": "(Children are not welcome|All guests must be adults)",
        }
    },
)

MUSEUMS = Domain(
    slots={
        "museum": "(The {TOWN} (Museum|Collection|Gallery)|The {THING} Museum|The Museum of "
        "(Bread|Clocks|Coffee|Glass|Maps|Tea|Toys|Wine))",
        "shows": "(old maps|kitchen tools|glass and silver|ship models|stone tools|film posters"
        "|musical clocks|painted birds|famous letters|coffee pots)",
        "town": "{TOWN}",
        "entry": "(free|cheap|expensive)",
        "cafe": "(bakery|bistro|coffee shop|tea room|wine bar)",
        "closed": "{DAY}",
        "visitors": "{SCORE}",
    },
    fewest=3,
    most=5,
    texts=(
        "{museum}[ in {town}] (shows {shows}|is a museum)."
        "[ (There is a {cafe} inside|It has a {cafe}).][ Entry is {entry}.]"
        "[ It is closed on {closed}.][ Visitors (rate it|give it) {visitors}.]",
        "{museum} is a museum[ of {shows}][ in {town}][ with a {cafe}]."
        "([ Entry is {entry}.][ It is closed on {closed}.]"
        "| Entry is {entry} and it is closed on {closed}.)"
        "[ Visitors (rate it|give it) {visitors}.]",
    ),
)

LAPTOPS = Domain(
    slots={
        "laptop": "(Arvo|Belmar|Corvid|Nimbus|Tessel|Vantor) "
        "(100|150|200|250|300|400|500|600|700|800|900)( Air| Max| Plus|)",
        "screen": "(11|12|13|14|15|16|17) inch",
        "memory": "(4|8|12|16|24|32|64) GB",
        "battery": "(5|6|7|8|9|10|11|12|14|16|18) hours",
        "weight": "(1.1|1.2|1.3|1.4|1.5|1.6|1.8|2.0|2.2|2.5) kg",
        "range": "{PRICE}",
        "buyers": "{SCORE}",
        "use": "(family|office|travel|study|gaming)",
    },
    fewest=3,
    most=5,
    texts=(
        "The {laptop} is a[ {range} price] laptop[ for {use} use][ with a {screen} screen]."
        "[ It has {memory} of memory.][ The battery lasts {battery}.][ It weighs {weight}.]"
        "[ (Its customer rating is|Customers rate it) {buyers}.]",
        "The {laptop} is a laptop[ for {use} use][ in the {range} price range]."
        "([ It has a {screen} screen.][ It has {memory} of memory.]"
        "| It has a {screen} screen and {memory} of memory.)"
        "([ The battery lasts {battery}.][ It weighs {weight}.]"
        "| It weighs {weight} and the battery lasts {battery}.)"
        "[ (Its customer rating is|Customers rate it) {buyers}.]",
    ),
)

HIKES = Domain(
    slots={
        "hike": "(The {ADJECTIVE} {THING} (Trail|Path|Walk)|The {TOWN} (Loop|Trail|Round))",
        "length": "(3|4|5|6|7|8|9|10|11|12|14|15|16|18) km",
        "start": "(the (pub|bakery|station|church|mill) in |){TOWN}",
        "effort": "(easy|gentle|hard|steep)",
        "view": "(the river|the harbour|the castle|the lake|the old town|the sea|the canal"
        "|green hills)",
        "families": "(yes|no)",
        "season": "(spring|summer|autumn|winter)",
    },
    fewest=3,
    most=5,
    texts=(
        "{hike} is a[ {length}] walk[ from {start}][ with a view of {view}]."
        "[ The (path|way) is {effort}.][ {families}.][ The best season is {season}.]",
        "{hike} is a[ {length}] walk[ that starts at {start}]."
        "[ You will find a view of {view}.][ Expect a path that is {effort}.]"
        "[ {families}.][ (It is best in|Visit it in) {season}.]",
    ),
    wording={
        "families": {
            "yes": "(It is friendly to families|It is a family walk)",
            "no": "(It is not for families|It is no place for children)",
        }
    },
)

FILMS = Domain(
    slots={
        "film": "(The {ADJECTIVE} {THING}|{THING} and {THING}|A {THING} in {TOWN}"
        "|The (Last|First|Second) {THING})",
        "genre": "(comedy|drama|mystery|musical|western|romance)",
        "director": "{PERSON}",
        "year": "(19(5|6|7|8|9)|20(0|1|2))(0|1|2|3|4|5|6|7|8|9)",
        "lead": "{PERSON}",
        "minutes": "(85|90|95|100|105|110|115|120|130|140)",
        "critics": "{SCORE}",
    },
    fewest=3,
    most=5,
    texts=(
        "{film} is a[ {year}] film[ by {director}][ with {lead}].[ It is a {genre}.]"
        "[ It lasts {minutes} minutes.][ Critics (rate it|give it) {critics}.]",
        "{film} is a {genre}[ from {year}][ by {director}].[ The main part is played by {lead}.]"
        "[ It lasts {minutes} minutes.][ Critics (rate it|give it) {critics}.]",
        "{film} is a film[ by {director}][ with {lead}].[ It is a {genre}.]"
        "[ It came out in {year}.][ It lasts {minutes} minutes.]"
        "[ Critics (rate it|give it) {critics}.]",
    ),
)

TRAINS = Domain(
    slots={
        "train": "(The {TOWN} (Express|Arrow|Mail)|(N|R|S|T)(1|2|3|4|5|6|7|8|9)(0|1|2|3|4|5))",
        "from": "{TOWN}",
        "to": "{TOWN}",
        "leaves": "(6|7|8|9|10|11|12|14|15|16|17|18|19|20):(00|15|30|45)",
        "platform": "(1|2|3|4|5|6|7|8|9|10|11|12)",
        "seats": "(cheap|moderate|expensive)",
        "meals": "(hot food|cold food|coffee and tea|wine and beer)",
    },
    fewest=3,
    most=5,
    texts=(
        "{train} is a train[ from {from}][ to {to}].[ It leaves at {leaves}.]"
        "[ It goes from platform {platform}.][ Seats are {seats}.]"
        "[ (You can order {meals}|{meals} can be had) on board.]",
        "{train} is a train[ from {from}][ to {to}]."
        "( It leaves at {leaves} from platform {platform}.|[ It leaves at {leaves}.]"
        "[ Find it at platform {platform}.])"
        "[ (Seats are {seats}|Expect {seats} seats).][ You can order {meals} on board.]",
    ),
)

CONCERTS = Domain(
    slots={
        "concert": "(The {TOWN} (Band|Choir|Players)|{PERSON}|The {ADJECTIVE} {THING}s)",
        "style": "(jazz|folk|opera|blues|chamber music|dance music)",
        "hall": "{LANDMARK}",
        "day": "{DAY}",
        "doors": "(6|7|8|9) o'clock",
        "tickets": "(cheap|moderate|expensive|free)",
        "tour": "{ADJECTIVE} {THING}",
    },
    fewest=3,
    most=5,
    texts=(
        "{concert} will play[ {style}][ at {hall}][ on {day}].[ Doors open at {doors}.]"
        "[ Tickets are {tickets}.][ The tour (goes by the name|is called) {tour}.]",
        "[On {day} ]{concert} will play[ {style}][ at {hall}]."
        "([ Doors open at {doors}.][ Tickets are {tickets}.]"
        "| Tickets are {tickets} and doors open at {doors}.)"
        "[ The tour (goes by the name|is called) {tour}.]",
    ),
)

FLATS = Domain(
    slots={
        "flat": "(1|2|3|4|5|6|7|8|9)(0|1|2|3|4|5|6|7|8|9|) {THING} (Street|Lane|Road)",
        "rooms": "(one|two|three|four|five)",
        "part": "{AREA}",
        "rent": "{PRICE}",
        "next door": "(bakery|bistro|coffee shop|pub|restaurant|tea room|wine bar)",
        "type": "(attic|cellar|garden|loft|studio)",
        "pets": "(yes|no)",
    },
    fewest=3,
    most=5,
    texts=(
        "{flat} is a[ {type}] flat[ with {rooms} rooms][ in the {part} area]."
        "[ There is a {next door} next door.][ (The rent is|Its price is) {rent}.][ {pets}.]",
        "{flat} is a flat[ with {rooms} rooms][ in the {part}].[ It is of the {type} type.]"
        "[ Next door you will find a {next door}.][ (The rent is|Its price is) {rent}.][ {pets}.]",
    ),
    wording={"pets": {"yes": "Pets are welcome here", "no": "Pets are not welcome"}},
)

BASE = (HOTELS, MUSEUMS, LAPTOPS, HIKES, FILMS, TRAINS, CONCERTS, FLATS)

RESTAURANTS = Domain(
    slots={
        "name": "The {ADJECTIVE} {THING}",
        "Type": "(bakery|bistro|coffee shop|pub|restaurant|tea room|wine bar)",
        "food": "{FOOD}",
        "price": "{PRICE}",
        "customer rating": "{SCORE}",
        "area": "{AREA}",
        "family friendly": "(yes|no)",
        "near": "{LANDMARK}",
    },
    fewest=3,
    most=5,
    always=("Type",),
    texts=(
        "[In the {area}, ][near {near}, ]you will find {name}, a {Type}[ for {food} food]."
        "[ (Expect {price} prices|Prices are {price} here).]"
        "[ Guests (rate it|give it) {customer rating}.][ {family friendly}.]",
        "(Order {food} food at|Visit) the {Type} {name}[ in the {area}][, near {near}]."
        "([ Expect {price} prices.][ Guests (rate it|give it) {customer rating}.]"
        "| Guests give it {customer rating} and prices are {price}.)[ {family friendly}.]",
        "[For {food} food, ]visit {name}, a {Type}[ in the {area}][, near {near}]."
        "([ Guests (rate it|give it) {customer rating}.][ {family friendly}.]"
        "| {family friendly} and guests give it {customer rating}.)[ Expect {price} prices.]",
    ),
    wording={
        "family friendly": {
            "yes": "(Families are welcome here|It is a place for families)",
            "no": "(It is a place for adults|Children are not welcome here)",
        }
    },
)
