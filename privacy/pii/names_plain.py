"""What is nobody's, for the tagger of names to learn: templates of captions and numbers, and things with names.

{np}, {pp}, {done}: a phrase of an ordinary caption; {thing}: of THINGS; {namesake}: a name that is no person's here.
Long, for it is all data.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CAPTIONS = r"""
{np}
{np} {pp}
{np} {pp}
{np} {ving}
{np} {ving} {pp}
{np} {ving} {pp}
{np} {ving} {np}
{np} {ving} {np} {pp}
{np} {verbs} {np}
{np} {verbs} {np} {pp}
{np} {verbs} {np} {pp}
{np} {verbs} {pp}
{np} {verbs} {adverb} {pp}
{np} {verb} {np} {pp}
{np} {done} {pp}
{np} {done} {pp}
{np} is {ving} {pp}
{np} are {ving} {np}
{np} and {np} {pp}
{np} and {np} {ving}
{np} with {np}
{np} with {np} {pp}
{np} of {np}
{np}, {np} and {np}
{np}, {np}, {np} {pp}
{np} {pp}, {pp}
{np} {pp} and {np} {pp}
{np} waiting for {np}
{np} looking at {np} {pp}
{np} wearing {np} and holding {np}
{np} made of {noun} and {noun}
{np} seen from {np}
{np} next to {np}
{np} {pp} at {noun_time}
{np} after {np}
{np} for {np}
{np}: {np}
{np} - {np}
{np}. {np} {ving} {pp}.
{ving} {np}
{ving} {np} {pp}
{ving} {pp}
{adverb} {ving} {np}
{adj} {noun}, {noun} and {noun}
{adj} and {adj} {noun} {pp}
{noun} {done} {pp}
{noun} {noun} {pp}
{noun} full of {noun}s
close up of {np}
close-up of {np} {pp}
macro shot of {np}
aerial view of {np}
black and white photo of {np} {pp}
the inside of {np}
there is {np} {pp}
there are {adj} {noun}s {pp}
this is {np}
photo of {np} {ving} {pp}
drawing of {np}
silhouette of {np} {pp}
pattern of {noun}s and {noun}s
reflection of {np} {pp}
view of {city} {pp}
{np} in {city}
{np} near {city}, {country}
{np} on {np} in {city}
{nationality} {noun} {pp}
how to {verb} {np}
{verb} {np} {pp}
{verb} {np} and {verb} {np}
no {ving} {pp}
do not {verb} {np}
what {np} {verbs} {pp}
where {np} {verbs} {np}
"""

NUMBERS = r"""
{n} {unit}
{n}{unit}
{n} {unit} {noun}
{n} {unit} of {noun}
{n}{unit} of {noun}
{noun}, {n} {unit}
{np}, {n} {unit}
{n} {unit} and {n} {unit}
{verb} {n} {unit} of {noun} with {n} {noun}s
{verb} at {n} {unit} for {n} minutes
{verb} for {n} to {n} {unit}
{n} {unit} {noun}, {n} {unit} {noun}, {n} {noun}s
{n}/{n} {unit} {noun}
{n}.{n} {unit}
{n}-{n} {unit}
{n},{n} {unit}
{n} x {n} {unit}
{n}x{n}x{n} {unit}
{label} {n}
{label} {n}
{label}: {n}
{label} no. {n}
{label} {letter}{n}
{label} {n}{letter}
{label} {n}, {label} {n}
{label} {n} {pp}
{np} {pp}, {label} {n}
{np} with {label} {code}
{thing}, {label} {n}
{label} {code}
{label}: {code}
the {label} is {n}
the {label} is {code}
{label} {n} of {n}
{label} {n}: {headline}
{n}mm f/{n}.{n}
{n}mm, f/{n}, 1/{n}s, ISO {n}
ISO {n}, 1/{n} at f/{n}
taken with a {n}mm lens at f/{n}.{n}
shot at {n}mm, ISO {n}
{thing} {n}mm f/{n}.{n}
{n}°C in {city}
{n} °F at {noun_time}
minus {n} degrees {pp}
{n}-{n}
{n}:{n}
{n}-{n} at half time
final score {n}-{n}
{city} {n}-{n} {city}
{city} beat {city} {n}-{n}
{city} {n} : {n} {city}
{n}-{n}, {n}-{n}, {n}-{n}
{n}th place {pp}
{n}st {noun}
{n}nd {noun} {pp}
{n}rd {adj} {noun}
{n}th century {noun}
scale 1:{n}
1:{n} map of {city}
1/{n} scale model of {np}
ratio {n}:{n}
{letter}{n}
{letter}{n} {noun}
{letter}-{n} {pp}
{letter}{letter}{n} {noun}
{letter}{letter} {n} {pp}
{letter}{n}{letter} {noun}
{thing} {n}
{thing} {letter}{n}
{thing} {letter} {n}
{thing} {n}{letter}, {year}
{brand} {n}-{n}
{brand} {letter}{n}-{n}
{year} {thing}
{year} {thing} {pp}
{n} {thing}
bus {n}
bus {n} {pp}
the {n} bus to {city}
tram {n}, {city}
line {n} {ving} {pp}
platform {n}, {city}
runway {n}
runway {n}{letter} at {city}
gate {letter}{n}
row {n}, seat {letter}
room {n}{letter}
terminal {n}, gate {n}
e{n} e{n}
1. e4 e5 2. Nf3 Nc6 3. Bb5 a6
d4 Nf6 c4 g6 Nc3 Bg7
{letter}x{letter}{n}+
{n} {noun}s, {n} {unit} {noun}
EUR {n}, shoe size {n}
size {n} {noun}
size {letter}{letter}
{n} for {n} euros
{n} pieces
{n}%
{n} % {noun}
{n}+{n}={n}
{n}k run
{n}/{n}
{n} of {n}
{n}.{n}.{n} {noun}
release {n}.{n}
v{n}.{n}
build {n}
{brand} {n}.{n}
{n}p video
{n} fps
{n} {noun} {pp}
{n} {adj} {noun}s {pp}
two by {n}
about {n} {unit} away
{n} {unit} high
{n} years ago
{n} days {pp}
aged {n} years
age {n}
{n}a
{n} a. m.
{n} pm {pp}
from {n} to {n}
between {n} and {n} {unit}
{city} {n} {unit}
{year}/{n}
{code}-{code}
{n}:{n}:{n}
"""

THINGS = r"""
{thing}
{thing}
{thing} {pp}
{thing} {pp}
{np} and {thing}
{np} {pp} with {thing}
{adj} {thing}
{adj} {thing} {pp}
{thing} {ving} {pp}
{thing} and {thing}
{thing}, {thing} and {thing}
{np} next to {thing}
{thing} logo
{thing} {noun}
photo of {thing}
{noun} with {thing}
{np} near {thing}
{np} {ving} {thing}
{np} {verbs} {thing} {pp}
{thing} in {city}
{thing} at {noun_time}
{thing} by {np}
the {thing}
an old {thing}
my {thing}
our {thing} {pp}
portrait of a {thing}
{thing} sign
{thing}: {adj} {noun}
{thing} ({year})
{namesake} {made}
{namesake} {made}
{namesake} {made} {pp}
{adj} {namesake} {made}
a {namesake} {made} and a {noun}
a {namesake} {made}
{namesake}'s {species}
{namesake}'s {species} {pp}
{adj} {species}, {namesake}'s {species}
Mount {namesake}
Mount {namesake} {pp}
Lake {namesake}
Lake {namesake} at {noun_time}
Cape {namesake} {pp}
Fort {namesake}
Port {namesake}
St. {namesake}'s {building}
Saint {namesake} {building}
{namesake} {building}
{namesake} {building} {pp}
the {namesake} {building} in {city}
the {namesake} {building}
{np} outside the {namesake} {building}
{np} at {namesake} {building}
{species}
{species} {pp}
{adj} {species} {ving} {pp}
{made} {pp}
{adj} {made}
{shout}
{shout} {shout}
{shout}!
{np} under a sign: {shout}
sign saying "{shout}"
"""

_LISTS = """
things: Tesla_Model_S Ford_Mustang Ford_pickup Mercedes Mercedes-Benz Porsche Lincoln_Continental Chrysler Dodge
Cadillac Buick Pontiac Bentley Rolls-Royce Aston_Martin Lotus Jaguar Citroën Renault Peugeot Opel Skoda Lancia
Alfa_Romeo Lamborghini Maserati Bugatti Fiat_Panda Seat_Ibiza Volvo Saab Scania Mazda Suzuki Subaru Mitsubishi Nissan
Hyundai Kia Austin_Mini Morris_Minor Hillman Studebaker Packard Harley-Davidson Ducati Triumph Vespa John_Deere
Massey_Ferguson Caterpillar Land_Rover Jeep Toyota_Hilux VW_Golf Beetle Stanley_knife Phillips_screwdriver Allen_key
Bowie_knife Swiss_army_knife Dremel Bosch_drill Makita Black_&_Decker Hilti Stihl Husqvarna Kitchenaid Dyson Hoover
Jacuzzi Thermos Zippo Colt_revolver Winchester_rifle Bic Parker_pen Montblanc Moleskine Singer_sewing_machine
Steinway Yamaha_piano Fender_Stratocaster Gibson_Les_Paul Marshall_amp Moog Hammond_organ Selmer_saxophone Leica
Hasselblad Rolleiflex Zeiss Pentax Olympus Polaroid Fujifilm GoPro Dell_laptop Lenovo Hewlett-Packard Philips Siemens
Garamond Baskerville Caslon Bodoni Didot Helvetica Arial Futura Times_New_Roman Georgia Verdana Calibri Cambria
Gill_Sans Franklin_Gothic Palatino Optima Rockwell Frutiger Univers Courier Comic_Sans Goudy Jenson Trajan
Jack_Russell Jack_Russell_terrier St._Bernard Saint_Bernard King_Charles_spaniel Great_Dane Labrador Doberman Rottweiler
German_shepherd Border_collie Gordon_setter Boston_terrier Yorkshire_terrier Bernese_mountain_dog Weimaraner Chihuahua
Dalmatian Maine_Coon Persian_cat Siamese Abyssinian Shetland_pony Clydesdale Hanoverian Lipizzaner Przewalski's_horse
Guernsey_cow Aberdeen_Angus Hereford Merino Rhode_Island_Red Thomson's_gazelle Steller's_jay Darwin's_finches
Granny_Smith Pink_Lady Golden_Delicious McIntosh_apple Cox's_Orange_Pippin Braeburn Bramley Jonagold Fuji Gala
Bartlett_pear Williams_pear Conference_pear Anjou Victoria_plum Mirabelle Clementine Seville_orange Meyer_lemon
Hass_avocado Cavendish_banana Bing_cherry Rainier_cherry Maris_Piper King_Edward_potato Russet_Burbank Cara
San_Marzano Black_Krim Brandywine Scotch_bonnet Madeleine Victoria_sponge Battenberg Sachertorte Black_Forest_gateau
Dundee_cake Pavlova Tarte_Tatin Charlotte_russe Peach_Melba Baked_Alaska Eccles_cake Bakewell_tart Lamington Napoleon
Eggs_Benedict Caesar_salad Waldorf_salad Cobb_salad Beef_Wellington Chicken_Kiev Salisbury_steak Margherita_pizza
Stroganoff Carpaccio Bolognese Alfredo Reuben_sandwich Bloody_Mary Tom_Collins Margarita Shirley_Temple Bellini
Manhattan Harvey_Wallbanger Martini Earl_Grey Lady_Grey Assam Darjeeling Arabica Dr_Pepper Jack_Daniel's Johnnie_Walker
Jim_Beam Captain_Morgan Jameson Heineken Guinness Chardonnay Merlot Pinot_Noir Dom_Pérignon Veuve_Clicquot Brie
Camembert Roquefort Gruyère Emmental Gouda Edam Cheddar Stilton Red_Leicester Monterey_Jack Colby Pecorino Manchego
Gorgonzola Mozzarella Ricotta Feta Babybel Philadelphia Saint_Agur Double_Gloucester Black-eyed_Susan Sweet_William
Queen_Anne's_lace Creeping_Jenny Jacob's_ladder Solomon's_seal Johnny_jump-up Jack-in-the-pulpit Busy_Lizzie
Michaelmas_daisy Marguerite Aaron's_rod St_John's_wort Veronica Erica Forsythia Wisteria Fuchsia Dahlia Begonia
Camellia Magnolia Gardenia Poinsettia Bougainvillea Zinnia Lobelia Freesia Rudbeckia Douglas_fir Norfolk_pine
Joshua_tree Leyland_cypress Bradford_pear Robinia Jack_pine David_Austin_rose Damask_rose Buddleia Eiffel_Tower
Big_Ben Tower_Bridge Notre-Dame Sacré-Cœur Mont_Saint-Michel Brandenburg_Gate Neuschwanstein Trevi_Fountain Rialto
Sagrada_Família Alhambra Hagia_Sophia Taj_Mahal Angkor_Wat Machu_Picchu Stonehenge Petra Abu_Simbel Karnak
Mount_Rushmore Golden_Gate_Bridge Empire_State_Building Chrysler_Building Rockefeller_Center Brooklyn_Bridge
Hoover_Dam Niagara_Falls Victoria_Falls Grand_Canyon Yosemite Yellowstone Christ_the_Redeemer Sugarloaf Uluru
Sydney_Opera_House Table_Mountain Kilimanjaro Matterhorn Mont_Blanc Mount_Fuji Mount_Everest Mount_McKinley Ben_Nevis
Snowdon Loch_Ness Lake_Victoria Lake_Como St_Paul's St_Peter's_Basilica Buckingham_Palace Windsor_Castle Versailles
Louvre Uffizi Prado Hermitage Burj_Khalifa Marina_Bay Petronas_Towers Hadrian's_Wall Nelson's_Column
Washington_Monument Lincoln_Memorial Statue_of_Liberty Mercury Venus Mars Jupiter Saturn Uranus Neptune Pluto Ceres
Titan Europa Io Ganymede Callisto Halley's_comet Orion Andromeda Cassiopeia Pleiades Sirius Betelgeuse Polaris Vega
Apollo_11 Saturn_V Voyager Hubble Cassini Milky_Way Art_Deco Art_Nouveau Baroque Rococo Bauhaus Cubism Impressionism
Pop_Art Op_Art Fauvism Surrealism Dada Expressionism Romanesque Tudor Georgian Edwardian Louis_XV Biedermeier
Chippendale Tiffany_lamp Wedgwood Meissen Delft Adirondack_chair Windsor_chair Eames_chair Morris_chair
Chesterfield_sofa Davenport Rubik's_cube Ferris_wheel Petri_dish Bunsen_burner Tesla_coil Newton's_cradle
Faraday_cage Van_de_Graaff_generator Geiger_counter Möbius_strip Klein_bottle Venn_diagram Mandelbrot_set
Fibonacci_spiral Gantt_chart Murphy_bed Molotov_cocktail Morse_code Braille Celsius Fahrenheit Kelvin Diesel_engine
Wankel_engine Stirling_engine Kalashnikov Zeppelin Guillotine Teddy_bear Barbie Ken_doll G.I._Joe Mickey_Mouse
Levi's_jeans Doc_Martens Chuck_Taylors Wellington_boots Cardigan Stetson Mackintosh Bermuda_shorts Panama_hat
Prince_of_Wales_check Paisley Nehru_jacket Mary_Janes Lego Jenga Scrabble Monopoly Tetris Pac-Man Nobel_Prize
Oscar_statuette Emmy Davis_Cup Ryder_Cup Stanley_Cup Super_Bowl Valentine's_Day St_Patrick's_Day Martin_Luther_King_Day
Cadbury Nestlé Hershey's Mars_bar Oreo Kellogg's Heinz Campbell's_soup Ben_&_Jerry's McDonald's Wendy's Burger_King
Domino's Walmart Ikea Sears Macy's Marks_&_Spencer Lloyds Barclays JPMorgan Wells_Fargo Goldman_Sachs Boeing
Lockheed_Martin Cessna Learjet Spitfire Airbus_A380 Titanic Queen_Mary Santa_Maria Mayflower Jolly_Roger Union_Jack

made: knife wrench screwdriver drill saw hammer plane chisel key lock engine motor burner flask dish beaker coil tube
wheel chair sofa desk bed lamp vase bowl teapot clock watch camera lens telescope microscope guitar piano organ violin
amp synthesizer rifle revolver pistol tractor truck pickup motorcycle bicycle scooter car sedan coupe convertible van
bus locomotive yacht boat jet plane helicopter rocket pen typewriter printer laptop phone radio speaker jacket jeans
boots trainers hat bag suitcase tent stove oven mixer fridge cheese cake pie tart sauce soup salad sandwich steak
cocktail whisky beer wine tea coffee chocolate cereal apple pear plum peach cherry orange lemon grape tomato potato
pepper font typeface sans grotesk serif slab effect law theorem equation constant scale diagram chart curve process
method cycle cube comet crater nebula number cup trophy prize medal award engine-shed dress bonnet

species: terrier spaniel retriever setter hound collie mastiff pointer shepherd poodle bulldog gull warbler sparrow
finch hawk eagle owl petrel tern sandpiper plover heron duck goose swan woodpecker jay pipit bunting hummingbird
gazelle zebra deer antelope monkey lemur bat mouse shrew whale dolphin porpoise turtle tortoise gecko skink frog toad
newt salamander snake viper trout salmon bass perch beetle moth butterfly bee wasp rose lily orchid tulip iris
daffodil fir pine spruce cypress oak maple willow palm fern cactus aloe sage mint clover thistle

building: Bridge Tower Castle Palace Cathedral Church Chapel Abbey Museum Library Gallery Theatre Stadium Arena Airport
Station Hotel Hospital Memorial Monument Fountain Dam Canal Falls Glacier Island Bay Beach Mountains Range National_Park
Zoo Observatory Lighthouse Pier Harbour Market Mall Hall University College Institute Foundation Cup Prize Ranch Farm

shouts: SALE OPEN CLOSED EXIT ENTRANCE STOP DANGER CAUTION WARNING KEEP_OUT NO_PARKING NO_ENTRY NO_SMOKING WET_FLOOR
EMERGENCY_EXIT PUSH PULL FREE NEW HELP SOS TAXI POLICE AMBULANCE FIRE HOTEL BAR CAFE PIZZA DINER MOTEL LIBRARY MUSEUM
WELCOME PRIVATE BEWARE_OF_THE_DOG DO_NOT_ENTER DO_NOT_TOUCH HIGH_VOLTAGE FOR_SALE FOR_RENT TO_LET OUT_OF_ORDER
BREAKING_NEWS GAME_OVER START FINISH HAPPY_BIRTHDAY CONGRATULATIONS SPEED_LIMIT ONE_WAY DEAD_END ROAD_CLOSED SLOW GO
YIELD MENU LOADING ERROR OK YES NO THE_END LOVE PEACE HOPE FAITH GRACE JOY MERCY VOTE STRIKE CLEARANCE LAST_CHANCE

units: g kg mg lb lbs oz ml l cl dl litres cups cup tbsp tsp tablespoons teaspoons pinches cloves slices pints quarts
gallons mm cm m km in inches ft feet yards miles nm µm ha acres m² sqm °C °F C F K degrees kelvin bar psi hPa Pa W kW
MW kWh V volts A mA Ah Hz kHz MHz GHz dB lux lumens rpm mph km/h kn knots hp Nm N J kcal cal kB MB GB TB Mbps px dpi ppi
fps bit bytes megapixels s sec ms min mins minutes hours hrs h days weeks months years points pts goals laps sets reps
rounds stars likes views pages copies pieces pcs people seats stops floors storeys carats ct cc proof pm am EUR USD GBP
euros dollars pounds yen cents percent

labels: number no page chapter section figure table plate lot room seat row gate platform terminal runway track lane
bus tram train line route flight exit junction stage level floor deck block pier berth hall booth aisle shelf box bay
channel season episode part volume issue edition series version release build model type class size grade score round
game match set lap heat group team player jersey serial_number part_number order_number order invoice ticket_number
ticket reference ref case_number account_number customer_number member_number card_number licence_number
registration_number phone_number house_number flight_number serial batch item article catalogue_number accession_number
inventory_number frame_number scale zoom exposure shutter aperture focal_length ISO temperature humidity altitude
elevation depth speed weight height width length distance step recipe exercise question answer problem verse psalm
opus symphony sonata Kennzeichen Nummer Seite Zimmer Gleis Linie Bahnsteig Größe Rechnung Kundennummer Bestellung
Ausweis Telefon numéro page_n° chambre quai ligne commande facture taille número página habitación andén línea pedido
factura talla numero pagina stanza binario linea ordine fattura taglia nummer bladzijde kamer spoor lijn bestelling
maat numer strona pokój peron linia zamówienie faktura rozmiar sida rum spår storlek beställning quarto plataforma
linha encomenda passport_no ID id PIN SKU EAN VIN IMEI MAC IP port
"""

_PHRASES = """
determiners: a a a a the the the the an_old this that some two three four five several many a_pair_of a_group_of
a_row_of a_stack_of a_pile_of a_bowl_of a_plate_of a_bunch_of a_cup_of a_field_of a_crowd_of his her my our their your
each every another no one both a_few lots_of

prepositions: in in in on on on at near by under over behind beside below above between inside outside against across
along around through into onto off from with without before after during past towards beneath among amid atop
in_front_of
next_to on_top_of at_the_edge_of in_the_middle_of at_the_foot_of at_the_end_of

participles: parked moored stacked covered filled decorated painted carved lit surrounded broken abandoned hidden hung
tied wrapped folded scattered arranged gathered perched seated dressed made built seen taken left lost frozen burnt
fried baked grilled sliced chopped served poured spilled torn worn rusted weathered overgrown flooded illuminated
reflected framed printed drawn sketched woven knitted stitched glued nailed locked chained leashed saddled harnessed
loaded packed shelved displayed mounted planted trimmed mown raked swept mixed whisked kneaded rolled
"""

_EVERYDAY = """
nouns: bread loaf toast butter jam honey sugar salt pepper flour dough pastry pie biscuit cookie pancake waffle muffin
croissant bagel pretzel noodle pasta spaghetti lasagne sushi curry stew broth sauce gravy ketchup mustard mayonnaise
vinegar oil herb basil parsley thyme oregano mint garlic onion leek celery cabbage lettuce spinach kale broccoli
cauliflower pea bean lentil chickpea pumpkin squash courgette aubergine cucumber radish turnip beetroot olive peach pear
plum apricot melon watermelon pineapple mango papaya kiwi fig date raspberry blueberry blackberry cranberry almond
walnut hazelnut chestnut peanut cashew bacon ham sausage steak chop beef pork lamb mutton veal turkey salmon trout cod
tuna shrimp prawn crab lobster oyster mussel squid octopus cream yogurt custard pudding icecream chocolate candy sweets
lollipop popcorn crisps fries sandwich picnic breakfast lunch dinner supper snack dessert drink cocktail lemonade
smoothie espresso latte cappuccino teapot kettle mug jug pitcher saucer tray napkin tablecloth cutlery spatula whisk
ladle sieve pan pot saucepan wok oven stove grill barbecue toaster blender fridge freezer dishwasher sink tap counter
cupboard drawer worktop pantry cellar attic loft hallway corridor stairs staircase balcony terrace porch patio veranda
courtyard driveway garage shed greenhouse conservatory fireplace chimney radiator carpet rug curtain blind cushion
pillow blanket duvet sheet mattress armchair couch stool bench shelf bookcase wardrobe dresser cabinet desk lantern
chandelier bulb socket plug switch fan heater vacuum broom mop bucket sponge soap towel toothbrush shampoo razor comb
brush basin bathtub shower toilet pavement sidewalk kerb crossing roundabout junction motorway tunnel lane alley path
trail track railway rail platform station airport runway terminal harbour port pier dock quay jetty marina canal lock
dam weir lighthouse cliff cave canyon valley ridge slope peak summit glacier volcano crater dune shore coast bay lagoon
reef cove estuary creek stream brook waterfall pond puddle marsh swamp meadow pasture prairie hedge orchard vineyard
haystack stable barnyard windmill watermill silo plough wheat barley oats hay straw oak pine birch maple willow bamboo
palm fern moss ivy bush shrub branch twig trunk root bark petal stem bud blossom bouquet tulip daisy lily sunflower
daffodil orchid poppy lavender iris cactus seed acorn cone foal calf piglet chick duckling gosling lamb kid cub fawn
pup hound terrier poodle spaniel retriever hamster gerbil ferret hedgehog badger otter beaver mole hare stag moose bison
buffalo donkey mule llama alpaca ostrich peacock swan goose heron crane stork flamingo pelican seagull gull pigeon dove
sparrow robin swallow magpie crow raven rook jackdaw woodpecker kingfisher hummingbird hawk falcon kite vulture bat moth
dragonfly beetle ladybird wasp grasshopper cricket worm slug caterpillar jellyfish starfish seal walrus bride groom
toddler infant teenager pensioner pedestrian cyclist jogger runner swimmer diver surfer skier skater climber hiker
camper tourist traveller passenger commuter driver rider jockey sailor fisherman captain crew pilot astronaut engineer
builder plumber electrician carpenter mechanic gardener baker butcher barber hairdresser tailor waiter waitress barista
bartender cashier shopkeeper vendor customer postman courier nurse surgeon dentist vet scientist judge lawyer
firefighter guard monk nun priest musician drummer guitarist pianist violinist conductor choir orchestra actor juggler
acrobat magician audience goalkeeper referee batsman boxer wrestler team squad fan flock herd swarm pack queue crowd
parade march festival concert ceremony carnival circus fair playground swing slide seesaw sandpit sandcastle trampoline
pram pushchair stroller backpack rucksack suitcase handbag purse wallet belt scarf hood jumper sweater cardigan blouse
skirt shorts trousers apron uniform helmet goggles sunglasses glasses earring bracelet brooch slipper sandal heel lace
zip pocket sleeve collar thread needle yarn fabric cotton wool silk leather denim velvet linen canvas easel palette
crayon chalk marker eraser ruler scissors stapler glue tape clip folder notebook diary calendar sticker stamp postcard
parcel package crate barrel basket sack jar tin can carton tub tube lid cork tractor lorry pickup van minibus coach tram
trolley cart wagon carriage sledge sleigh canoe kayak raft dinghy yacht ferry barge trawler anchor oar sail mast paddle
surfboard snowboard ski skateboard rollerblade kite frisbee dart puck racket bat club goal net hoop court pitch stadium
scoreboard whistle medal trophy podium checkers domino dice puzzle toy doll teddy balloon firework sparkler bonfire
campfire tent hammock torch compass binoculars telescope lens tripod drone battery charger cable headphone mixer amp
trumpet trombone saxophone clarinet flute cello harp accordion harmonica tambourine xylophone statue sculpture fountain
monument mural graffiti mosaic tapestry ruin arch column dome spire steeple gate archway courtyard wharf warehouse
factory workshop office cubicle lobby lift elevator escalator hall classroom library laboratory gym pool sauna ward
clinic pharmacy bakery butchery grocery supermarket stall kiosk booth arcade cinema theatre gallery museum aquarium zoo
skyline skyscraper rooftop crane scaffolding brick plank beam tile pipe wire bolt screw spanner pliers drill axe shovel
spade rake hoe hose sprinkler wheelbarrow lawnmower fog mist haze drizzle shower hail sleet frost icicle snowflake
snowman avalanche flood drought breeze gale hurricane tornado thunder dew dusk dawn twilight moonlight sunlight shade
shadow glow spark flame ember ash dust mud gravel pebble boulder clay

verbs: slice chop peel grate stir whisk pour boil fry roast grill toast serve taste chew sip swallow lick bite feed
water
plant dig rake mow trim prune pick harvest gather collect stack pile pack unpack load unload lift lower drag drop roll
slide spin twist bend stretch fold unfold wrap unwrap tie untie knit sew weave stitch iron hang dry wipe scrub sweep mop
polish dust rinse soak splash dive float sail row paddle surf skate ski sledge cycle pedal jog hike stroll wander march
crawl creep hop skip leap bounce chase follow lead greet hug cuddle kiss tickle pat stroke pet groom brush comb shave
trim dress undress zip button tighten loosen hammer saw drill screw bolt weld solder repair fix mend assemble install
adjust measure weigh count sort arrange decorate frame sketch trace colour sculpt carve mould glaze photograph film
record edit print type text call dial answer ask explain teach learn study revise practise rehearse perform conduct
strum drum whistle hum chant cheer clap applaud wave nod bow kneel crouch squat lean recline doze nap snore yawn stare
gaze peer glance wink blink frown grin giggle whisper shout scream celebrate toast blow light extinguish burn melt
freeze
drip leak spill overflow sparkle glow shine flicker cast stretch sprawl perch nest graze gallop trot bark growl purr
hiss howl chirp sing buzz hover swoop soar glide land park reverse overtake stop cross board queue wait shop browse buy
sell pay deliver inspect examine repaint restore pose
"""

LISTS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    name: tuple(word.replace("_", " ") for word in words.split())
    for name, words in (paragraph.split(":", 1) for paragraph in f"{_LISTS}{_PHRASES}{_EVERYDAY}".strip().split("\n\n"))
})  # fmt: skip
