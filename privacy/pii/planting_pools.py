"""Words that planted captions are made of: people, streets and towns by locale, templates, and what looks like data.

Kept for measuring: no detector may be written, tuned or trained on them (`names_training` has pools of its own).
Everybody and every house is invented; a name may be somebody's by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def _table(text: str) -> Mapping[str, tuple[str, ...]]:
    """Lines of "key: word, word"; one that begins with a space goes on with the line before."""
    rows = dict(line.split(": ", 1) for line in text.replace("\n  ", " ").strip().splitlines())
    return MappingProxyType({key: tuple(words.split(", ")) for key, words in rows.items()})


def _lines(text: str) -> tuple[str, ...]:
    return tuple(text.strip().splitlines())


GIVEN = _table("""
en_US: Shelby, Darnell, Kaitlyn, Marcus, Tamika, Brody, Colleen, Dwayne, Paige, Travis, Latoya, Wyatt, Autumn,
  Randall
en_GB: Imogen, Alistair, Gemma, Rhys, Philippa, Callum, Bronwen, Nigel, Tamsin, Hamish, Saffron, Barnaby, Morag,
  Gareth
en_AU: Kirralee, Lachlan, Bindi, Heath, Jacinta, Darcy, Tegan, Brayden, Narelle, Angus, Mackenzie, Corey, Leanne,
  Flynn
en_IN: Lakshmi, Arjun, Deepika, Sanjay, Kavitha, Rohan, Meenakshi, Vikram, Ananya, Harish, Pooja, Nikhil, Sunita,
  Tarun
de_DE: Annegret, Holger, Wiebke, Thorsten, Gudrun, Detlef, Silke, Jochen, Ulrike, Rüdiger, Heike, Björn, Sieglinde,
  Uwe
fr_FR: Solène, Bastien, Maëlle, Thibault, Océane, Gaëtan, Capucine, Loïc, Delphine, Yannick, Clémence, Aurélien,
  Noémie, Rémi
es_ES: Itziar, Gonzalo, Montserrat, Íñigo, Nuria, Álvaro, Rocío, Xavier, Begoña, Joaquín, Inmaculada, Borja, Pilar,
  Nacho
it_IT: Ornella, Gianluca, Fiorella, Massimo, Ginevra, Alessio, Loredana, Fabrizio, Rossella, Ettore, Simonetta,
  Ivano, Mirella, Renzo
nl_NL: Femke, Joost, Marloes, Sjoerd, Anouk, Wouter, Liesbeth, Bram, Maaike, Jeroen, Sanne, Teun, Jolanda, Gijs
pl_PL: Agnieszka, Przemysław, Małgorzata, Grzegorz, Jadwiga, Zbigniew, Bożena, Wojciech, Kinga, Bartosz, Urszula,
  Leszek, Iwona, Mateusz
pt_BR: Thaís, Leandro, Juliana, Caio, Fernanda, Rogério, Letícia, Otávio, Priscila, Murilo, Luciana, Vinícius,
  Débora, Renato
sv_SE: Gunilla, Torbjörn, Annika, Håkan, Ebba, Fredrik, Birgitta, Mattias, Linnea, Göran, Pernilla, Staffan, Sigrid,
  Jonas
ja_JP: Haruka, Kenji, Yumiko, Takeshi, Sakura, Daichi, Ayumi, Hiroshi, Mitsuko, Ryota, Naoko, Shinji, Emiko, Tatsuya
""")
SURNAMES = _table("""
en_US: Haggerty, Broussard, Whitlock, Pettigrew, Lindqvist, Okafor, Delgadillo, Kowalczyk, Mabry, Tran,
  Stubblefield, Vandermeer, Ruiz, Goldfarb
en_GB: Featherstone, Pryce-Jones, Ogilvie, Winterbottom, Adeyemi, McAllister, Thackeray, Bhatt, Cholmondeley,
  Ashworth, Trevithick, Sutcliffe, Llewellyn, Crabtree
en_AU: Wallaroo, Gillespie, Papadakis, O'Halloran, Nguyen, Birdsell, McKinnon, Tully, Beaumaris, Rankin, Staunton,
  Vella, Whiteley, Drummond
en_IN: Venkataraman, Chatterjee, Kulkarni, Pillai, Ahluwalia, Bandyopadhyay, Reddy, Gokhale, Mukherjee, Nambiar,
  Thakur, Deshpande, Iyengar, Sandhu
de_DE: Kirchhoff, Brandstätter, Oelschläger, Vogelsang, Dürr, Hülsmann, Zimmermann, von Grabow, Wüstefeld,
  Rademacher, Kleinschmidt, Öztürk, Fassbender, Groß
fr_FR: Delacourt, Beaumanoir, Lefèvre, Marchetti, Haddad, Guilbert, de La Fontenay, Pélissier, Charpentier,
  Brossard, N'Diaye, Vasseur, Teyssier, Cazeneuve
es_ES: Etxeberria, Castellanos, Fuentes Rubio, Aguirre, Peñalver, Santamaría, Villanueva, de la Torre, Zubiri,
  Montalbán, Cienfuegos, Ibarra, Quesada, Benítez
it_IT: Bencivenga, Scognamiglio, Tagliaferri, Di Lorenzo, Abbiati, Squarcialupi, Della Valle, Zanardelli,
  Pasquinelli, Lo Cascio, Mastroianni, Brambilla, D'Ambrosio, Fumagalli
nl_NL: van der Meulen, Hoekstra, de Graaf, Wijnbergen, ter Horst, Dijksterhuis, van Loon, Kuipers, Bouwmeester, El
  Amrani, Vermeulen, Zijlstra, op den Kamp, Schilder
pl_PL: Wiśniewska, Szczepański, Brzezińska, Kołodziej, Zawadzki, Grabowska, Jabłoński, Maciejewska, Pietrzak,
  Gąsior, Dębska, Sikorski, Wróblewska, Bielecki
pt_BR: Figueiredo, Nascimento, Cerqueira, Cavalcanti, do Amaral, Teixeira, Magalhães, Siqueira, Barroso, da
  Conceição, Guimarães, Bittencourt, Furtado, Peixoto
sv_SE: Sjöström, Lagerkvist, Åkerblom, Nyqvist, Hägglund, af Ekenstam, Bergfalk, Strömbäck, Öhman, Rosenqvist,
  Tegnér, Wallander, Sandberg, Norén
ja_JP: Watanabe, Nakamura, Kobayashi, Yoshida, Matsumoto, Shimizu, Hayashida, Okamoto, Fujiwara, Morimoto, Ishikawa,
  Takahashi, Kuroda, Nishida
""")
STREETS = _table("""
en_US: Larkspur Lane, Old Mill Road, Juniper Avenue, W Cottonwood Dr, Prairie View Blvd, SE Alder Street, Quarry
  Court, Pelican Way, County Road 214, Tamarack Trail
en_GB: Pemberton Crescent, Tanner's Row, Hawthorn Close, Cobbler's Lane, Kirkgate, Lower Marsh Street, Vicarage
  Gardens, Ropewalk Mews, Ferry Road, The Shambles
en_AU: Wattle Street, Gumnut Court, Kurrajong Parade, Esplanade East, Bottlebrush Drive, Lorikeet Crescent,
  Tallowwood Road, Cootamundra Street, Pier Avenue, Jetty Road
en_IN: 4th Cross Road, Nehru Nagar, Linking Road, Sector 17, Park Street, Ashok Marg, Temple Street, Gandhi Bazaar
  Main Road, Rajpath Colony, Station Road
de_DE: Lindenallee, Am Mühlgraben, Schillerstraße, Kastanienweg, Goethestr., Bürgermeister-Smidt-Straße, Neuer
  Markt, Ahornring, Zur Alten Furt, Eichendorffgasse
fr_FR: rue des Tilleuls, avenue Jean Moulin, boulevard Gambetta, chemin du Moulin Vert, place de la Halle, impasse
  des Cerisiers, quai Voltaire, allée des Mimosas, rue Pasteur, cours Lafayette
es_ES: Calle del Olmo, Avenida de los Pinos, Plaza de San Telmo, Paseo de la Alameda, C/ Cervantes, Carrer de
  Balmes, Ronda de Toledo, Camino Viejo, Calle Azorín, Travesía del Horno
it_IT: Via dei Glicini, Corso Mazzini, Piazza della Repubblica, Viale dei Cipressi, Via Garibaldi, Vicolo Stretto,
  Largo Augusto, Via Leopardi, Strada Provinciale, Via Santa Lucia
nl_NL: Lindelaan, Molenstraat, Westersingel, Prins Hendrikkade, Beukenhof, Oude Gracht, Julianaweg, Marktplein,
  Zonnebloemstraat, Haverstraat
pl_PL: ul. Lipowa, ul. Mickiewicza, al. Niepodległości, ul. Ogrodowa, pl. Wolności, ul. 3 Maja, ul. Kwiatowa, os.
  Słoneczne, ul. Kościuszki, ul. Zielona
pt_BR: Rua das Acácias, Avenida Beira-Mar, Rua Sete de Setembro, Travessa do Sol, Alameda dos Ipês, Rua Padre
  Anchieta, Av. Getúlio Vargas, Rua do Comércio, Praça da Matriz, Rua Santos Dumont
sv_SE: Björkvägen, Drottninggatan, Kyrkogatan, Skeppsbron, Norra Strandvägen, Lingonstigen, Hantverkargatan,
  Rönngränd, Järnvägsgatan, Tallbacken
ja_JP: Sakuragaoka, Higashiyama, Kitahorie, Nakamachi, Minamisenba, Hongo, Shimorenjaku, Asahigaoka, Yoyogi,
  Matsubara
""")
TOWNS = _table("""
en_US: Bozeman, Chattanooga, Eau Claire, Fort Collins, Asheville, Walla Walla, Duluth, Baton Rouge
en_GB: Harrogate, Aberystwyth, Stow-on-the-Wold, Paisley, Whitby, Kidderminster, Truro, Bury St Edmunds
en_AU: Wagga Wagga, Geelong, Toowoomba, Fremantle, Launceston, Bendigo, Cairns, Katoomba
en_IN: Coimbatore, Nagpur, Mysuru, Pune, Lucknow, Kochi, Indore, Visakhapatnam
de_DE: Göttingen, Bad Kreuznach, Freiburg im Breisgau, Lübeck, Würzburg, Kassel, Erfurt, Oldenburg
fr_FR: Grenoble, Saint-Malo, Aix-en-Provence, Clermont-Ferrand, Besançon, Nîmes, La Rochelle, Angers
es_ES: Valladolid, San Sebastián, Zaragoza, Alcalá de Henares, Cádiz, Logroño, Murcia, Gijón
it_IT: Ferrara, Reggio Emilia, Perugia, Trieste, Lecce, Bergamo, La Spezia, Cuneo
nl_NL: Zwolle, 's-Hertogenbosch, Haarlem, Deventer, Leeuwarden, Breda, Alphen aan den Rijn, Venlo
pl_PL: Rzeszów, Bielsko-Biała, Toruń, Gliwice, Łódź, Olsztyn, Zielona Góra, Kielce
pt_BR: Florianópolis, Ribeirão Preto, Juiz de Fora, São Luís, Uberlândia, Niterói, Londrina, Aracaju
sv_SE: Örebro, Västerås, Linköping, Umeå, Kalmar, Borås, Karlstad, Visby
ja_JP: Kanazawa, Okayama, Matsuyama, Takamatsu, Sendai, Nagano, Kumamoto, Hakodate
""")

# "#" a digit, "*" one but 0, "@" a letter; house "{n}", street "{s}", town "{t}", state "{S}".
ADDRESSES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "en_US": ("{n} {s}, {t}, {S} *####", "{n} {s}, Apt *@, {t}, {S} *####", "{n} {s}", "{n} {s}\n{t}, {S} *####",
              "{n} {s}, {t}"),
    "en_GB": ("{n} {s}, {t} @@* *@@", "Flat *, {n} {s}, {t}", "{n} {s}, {t}, @@{n} *@@",
              "{n} {s}"),
    "en_AU": ("{n} {s}, {t} {S} ****", "Unit *, {n} {s}, {t}", "*/{n} {s}, {t} {S} ****",
              "{n} {s}"),
    "en_IN": ("{n}, {s}, {t} **####", "Flat No. {n}, {s}, {t} - **####", "No. {n}, {s}, {t}"),
    "de_DE": ("{s} {n}, *#### {t}", "{s} {n}", "{s} {n}\n*#### {t}", "{s} {n}a, D-*#### {t}"),
    "fr_FR": ("{n}, {s}, *#### {t}", "{n} {s}, *#### {t}", "{n} bis {s}, *#### {t}", "{n} {s}, {t}"),
    "es_ES": ("{s}, {n}, *#### {t}", "{s} {n}, *º @, *#### {t}", "{s}, {n}", "{s} {n}, {t}"),
    "it_IT": ("{s} {n}, *#### {t}", "{s}, {n}, *#### {t} (@@)", "{s} {n}", "{s} {n}, {t}"),
    "nl_NL": ("{s} {n}, **** @@ {t}", "{s} {n}-*, ****@@ {t}", "{s} {n}", "{s} {n}, {t}"),
    "pl_PL": ("{s} {n}, **-*** {t}", "{s} {n}/*, **-*** {t}", "{s} {n} m. *, {t}"),
    "pt_BR": ("{s}, {n}, {t} - @@, *####-***", "{s}, {n}, apto. **, {t}", "{s}, {n}"),
    "sv_SE": ("{s} {n}, *** ** {t}", "{s} {n} @, *** ** {t}", "{s} {n}"),
    "ja_JP": ("*-{n}-* {s}, {t} ***-****", "*-{n}-* {s}, {t}", "*-*-{n} {s}"),
})  # fmt: skip
STATES: Mapping[str, str] = MappingProxyType({"en_US": "MT TN WI CO NC WA MN LA", "en_AU": "NSW VIC QLD WA TAS"})

# A slot is an entity to plant or a filler of `planting`; "person_2" is another person.
TEMPLATES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "en": _lines("""
{person} waters the tomatoes on the balcony
portrait of {person}, {year}, gelatin silver print
wedding of {person} and {person_2} at {place}
{person} with her {animal} at {place}
snapped by {person} on a foggy morning
© {year} {person}
a {colour} {thing} carved by {person}
Left to right: {person}, {person_2} and {person_3}
coach {person} hugs goalkeeper {person_2} after the final
Happy 40th birthday {person}!! we all miss you
screenshot of a chat with {person} about the {thing}
{person}'s {colour} {thing}, seen from behind
vintage postcard signed "{person}"
name tag that says HELLO my name is {person}
Illustration: {person}, {place}
in loving memory of {person}, {year}-2019
Dr {person} explains the x-ray to two students
the trophy goes to {person} ({place})
a crayon drawing by {person}, age 6
selfie, me n {person} @ {place}
the {colour} house at {address} is for sale
open day at {address}, free coffee
parcel addressed to {address}
street view of {address} in the rain
envelope: {person}, {address}
we moved! new home: {address}
Broken window, {address}, reported {date}
real estate flyer, 3 bed, {address}, asking {price}
doorbell of {person}, {address}
deliver the {thing} to {person}, {address}.
business card of {person}, {phone}, {email}
for prints of this {animal} write to {email}
flyer for a lost {animal}, call {phone}
LOST {animal}!! Reward. Tel: {phone} or {phone_2}
{colour} {thing} for sale, {price}, text {phone}
hand-painted van that reads 24h locksmith {phone}
DM or email me ({email}) for commissions
from: {person} ({email})
Contact: {email} | {phone}
booking {phone} / {email}
ring {person} on {phone} after 6
whatsapp {phone} for the {thing}
a poster with the phone number {phone}
subscribe at {email} for more {animal} pics
piano lessons, {phone}, ask for {person}
photo of a bank card, {card}, on a {colour} table
mock-up of a {colour} credit card {card}
screenshot of an order paid with {card}, total {price}
cc {card} left on a bench
visa ending soon: {card}, exp 09/27
donations to {iban}, thank you for the {thing}
invoice {number}, please pay {price} to {iban}
IBAN {iban} on a crumpled receipt
transfer slip: {person}, {iban}
form with SSN {ssn} filled in by hand
tax paper, social security number {ssn}
scanned letter, {person}, {ssn}
id card, {national_id}, next to a {thing}
passport scan with {national_id}
{person}, {national_id}, signed {date}
a {colour} car parked badly, {plate}
tow truck and {plate} at {place}
terminal window, ping {ip}, 64 bytes
router page at {ip} with default login
error from {ip} at {time}
server rack labelled {ip}
back of a router, {mac}
sticker: MAC {mac}, model {model}
device {mac} joined
profile page {url} of a {animal} lover
see more at {url}
browser showing {url}
taken at {gps} by a drone
geotag {gps}, {date}
map pin ({gps}) near {place}
file dialog with {home_path}
exported from {home_path}
saved to {home_path} on {date}
follow {username} for daily {animal} drawings
art by {username}
meme of a {animal}, credit {username}
"""),
    "de": _lines("""
{person} vor dem Rathaus in {place}, Foto von {person_2}
Flohmarkt in der {address}, Tel. {phone}
Visitenkarte: {person}, {email}
Haus zu verkaufen, {address}
Spendenkonto {iban}, danke!
"""),
    "fr": _lines("""
{person} dans son jardin, photo de {person_2}
à vendre : maison, {address}
tél. {phone}, demander {person}
carte de visite de {person}, {email}
virement sur {iban}
"""),
    "es": _lines("""
{person} con su perro en {place}
se vende piso en {address}
llamar a {person}, {phone}
escríbeme a {email}
ingreso en la cuenta {iban}
"""),
    "it": _lines("""
{person} al mare con {person_2}
casa in vendita, {address}
chiamare {phone}, chiedere di {person}
biglietto da visita: {person}, {email}
bonifico su {iban}
"""),
    "nl": _lines("""
{person} op de fiets in {place}
te koop: huis aan de {address}
bel {phone} en vraag naar {person}
mail {email} voor meer foto's
overmaken naar {iban}
"""),
    "pl": _lines("""
{person} na rynku w {place}
dom na sprzedaż, {address}
tel. {phone}, {person}
napisz na {email}
wpłaty na konto {iban}
"""),
    "pt": _lines("""
{person} na praia com {person_2}
vende-se casa, {address}
ligue para {phone} e fale com {person}
contato: {email}
depósito na conta {iban}
"""),
    "sv": _lines("""
{person} vid sjön med {person_2}
hus till salu, {address}
ring {phone}, fråga efter {person}
mejla {email} för mer bilder
betala till {iban}
"""),
})  # fmt: skip

FILLERS = _table("""
animal: tabby cat, beagle, parrot, grey pony, tortoise, golden retriever, jersey cow, barn owl
colour: teal, rusty, pale pink, lime green, striped, navy, plum, bottle green
thing: bicycle, teapot, pine bench, tiffany lamp, guitar, kite, brass clock, skateboard
place: Loch Ness, the Golden Gate Bridge, Grand Canyon, Brighton Pier, Mount Fuji, Covent Garden, the Rialto, Bondi
  Beach, Central Park, Montmartre
""")

# Captions that hold nobody's data, and look like none.
PLAIN = _lines("""
a {colour} {thing} leaning on a wall at {place}
two {animal}s asleep on a sofa
watercolour of {place} at dusk
a man in a {colour} coat waits for the bus
a woman slices bread on a wooden board
three children build a sandcastle near the pier
an old couple sharing an umbrella
portrait of a girl with a {colour} scarf
a baby holding a {animal}'s ear
close-up of a {animal} with wet fur
a {animal} jumping over a puddle
flock of birds over a wheat field
{place} in the fog, black and white
sunset behind {place}
crowd in front of {place}
a bowl of soup and two spoons on a {colour} tablecloth
cupcakes with {colour} icing
fresh basil and ripe tomatoes
empty chairs around a table, seen from above
a {colour} door with a brass handle
{thing} on a shelf, soft morning light
a {thing} made of paper
still life with {thing} and pears
an astronaut riding a {animal}, digital art
logo of a {animal} inside a circle
seamless pattern with {colour} leaves
icon of a {thing}, flat design
isometric drawing of a small kitchen
pencil sketch of an old harbour
a teacher writes on the blackboard
firefighters drinking tea
a goalkeeper stretching for the ball
cyclists on a mountain road
surfer on a big wave
a violin player in the subway
people dancing at a street festival
snow on the roof of a wooden cabin
rusty tractor in tall grass
a train crossing an iron bridge
traffic lights in the rain
a castle on a hill, oil painting
Northern lights over a lake
the moon above {place}
Easter eggs in a basket
a Christmas tree in an empty room
Japanese maple in autumn
a French bulldog in a sweater
street food in Bangkok
map of Europe in {colour}
a screenshot of a game with a {animal}
a cartoon {animal} wearing sunglasses
no entry sign on a {colour} fence
happy birthday card with a {animal}
my cat hates mondays lol
best {thing} ever!!
""")

# Captions that hold nobody's data, whatever they look like.
LOOKALIKES = _lines("""
close-up of a {animal}, {camera}
{colour} {thing}, {size}, {price}
IMG_{number}.jpg
{place}, {date}
shot on a {model}, {camera}
issue {number}, page 12, {year}
sale! {price} instead of {price_2}
order {order} has shipped
ISBN {isbn} on the back of a paperback
release {version} of the editor, dark theme
barcode {ean} on a cereal box
scoreboard 3-1 in the 89th minute, {place}
recipe card: 200 g flour, 2 eggs, 180 °C
timetable, bus 42, {time} and {time_2}
chart of sales {year}-{year_2}, {percent} up
{hex} swatch beside {hex_2}
a robin on a spade in the rose garden
victoria sponge on a lily of the valley plate
jack-o'-lantern, {date}
Art Deco tower in Miami, {year}
Mercedes and Lotus at the motor show, {place}
Saint Bernard puppies in a basket
a jar of Dijon beside a Granny Smith apple
the Milky Way over {place}, {camera}
abstract no. {number}, oil on board
Christmas tree at {place}
Boeing 747-400 on runway 27R
font specimen, Garamond {size}
#throwback @ the beach
screenshot of https://example.org/{thing_word}/{number}
file /usr/share/icons/{number}.svg
room 12, seat 34C
Fresh basil and Roma tomatoes
a Persian rug, {size}
Monday blues, coffee, {time}
flight LH{number} to {place}
a Philips screwdriver and a {colour} {thing}
{animal} wearing a Santa hat
Paris, Texas road sign
statue of Venus, marble, {year}
eclipse of {date} seen from {place}
{grains} grains of rice
user manual, section 4.3.2.1, figure {number}
rgb(128, {small}, {small_2})
late night at the museum, {year}
chess diagram, e4 e5 Nf3 Nc6
spreadsheet with {order} in cell B7
tracking {tracking}
map scale 1:{number}
""")
