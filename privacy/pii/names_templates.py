"""Templates of the sentences that the tagger of names learns from, one a line; \\n and \\t are what they say.

{person}: in any form; {first}, {last}, {address}, {street}: parts of one; the rest is no business of that tagger.
Long, for it is all data.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PERSONS = r"""
a photo of {person}
photo of {person} {ving} in {city}
portrait of {person}, {year}
{person} at the {noun}
{person} {ving} with a {adj} {noun}
{person} and {person} at the {noun} in {city}
{adj} {noun} painted by {person}
drawing by {person}
{noun} by {person}
{adj} {noun} - by {person}
image courtesy of {person}
photographer: {person}
© {person} {year}
(c) {year} {person}. all rights reserved.
photo credit: {person} / {org}
author: {person}
created by {person}, {date}
uploaded by {person} on {date}
{person}
{person}, {job}
{person} ({year}-{year})
{person}: {adj} {noun}
{person} | {org}
{person} - {job} at {org}
my friend {first} holding a {noun}
{first} and {first} {ving} on the {noun}
{first}'s {adj} {noun}
{first}, {n}, with a {adj} {noun}
a {adj} {noun} for {first}
happy birthday {first}!
{last} family {noun}
mr {last} and his {noun}
the {job} {person} {verb}s a {noun}
{person} in a {adj} {noun}, {ving} {adverb}
a {noun} named {first} {ving} near the {noun}
a man named {person} stands beside the {noun}
a woman called {person} {ving} in front of a {noun}
this is {person} with the {noun} we bought in {city}
left to right: {person}, {person} and {person}
from left: {person}, {person}, {person}, {person}
{person}, {person} & {person}
{person} with {first} and {first} at home
selfie with {first} in {city}
{first} in {year}
{first} {ving}
{ving} with {first}
{noun} of {first} and {last}
wedding of {first} and {first} {last}, {city}, {date}
{person} signing a {noun} at {org}
statue of {person} in {city}
{person} (left) and {person} (right) {ving}
self portrait, {person}
{adj} portrait of {job} {person}
signed {person}
design: {person}
text by {person}, illustration by {person}
thanks to {person} for the {noun}
with love from {first}
to {first} from {first}
interview with {person} about the {noun}
dr {last} {ving} a {noun}
my name is {person} and i live in {city}
My name is {person}.
I'm {first} and this is my {noun}.
hi, i am {person}, please send me the {noun}
{person} lives in {city} and works as a {job}.
{person} was born on {date} in {city}, {country}.
Yesterday {person} met {person} at {org}.
Please contact {person} at {email} or {phone}.
Contact: {person}, {phone}
{person} <{email}>
{person}, {email}, {phone}
call {first} at {phone}
ask for {first} {last} at the {noun}
Name: {person}
name: {person}, phone: {phone}
Name: {person}; e-mail: {email}
Patient: {person}, born {date}
Customer {person} paid with card {card}.
account holder {person}, iban {iban}
Invoice for {person}, {address}
employee {code}: {person}
passenger {person}, seat {n}{letter}
student {person} from {org}
Dear {person},
Dear {title} {last}, thank you for your {noun}.
Hello {first}, how was the {noun}?
Regards, {person}
best, {first}
{person} said the {noun} was {adj}.
"{adj} {noun}", said {person}.
According to {person}, the {noun} is {adj}.
{person} has been a {job} at {org} since {year}.
Why did {person} {verb} the {noun}?
Did you see {first} {ving} {adverb}?
The {noun} belongs to {person}.
We gave {first} a {noun} and {last} a {noun}.
{title} {last} will {verb} the {noun} on {date}.
{person} won the {noun} in {city} in {year}
{person} is {n} years old.
{first} is the {noun} of {first}.
{last}, {first}
{last} et al., {year}
{last} and {last} ({year})
{code} {person} {date}
{date} {person} {noun}
{noun} {person} {noun}
{adj} {noun} {first} {noun}
{person}{person_tail}
file: {first}_{last}_{noun}.jpg
{first}{last}{n}.png
IMG_{code} {person} {city}
{first}-{last}-{noun}
@{person} {verb} the {noun}
tags: {noun}, {person}, {noun}, {city}
{city}, {country}: {person} and the {noun}
{person} of {city}
{person}'s {noun} in {city}
the late {person}
coach {last} {ving}
{nationality} {job} {person}
{nationality} {job} {person} {ving} at {org}
{org} president {person} speaks in {city}
Player {person} (number {n}) {verb}s the ball
singer {person} and band on stage in {city}
class of {year}: {person}, {person}, {person}
Mother {first}, father {first} and daughter {first} at the {noun}
grandma {first} and grandpa {first}
uncle {first} with his {noun}
aunt {first}
baby {first}, {n} months
little {first} {ving} with a {noun}
our dog with {first}
{first} loves the {adj} {noun}
I told {first} that {first} was {ving}.
was {first} there when {person} came?
{person} married {person} in {year}.
{person} (@{handle})
who is {person}?
Foto von {person} in {city}
{person} beim Wandern in {city}
Frau {last} und Herr {last}
photo de {person} à {city}
{person} avec son chien
madame {last} et monsieur {last}
foto de {person} en {city}
{person} con su perro en {city}
la señora {last} y el señor {last}
ritratto di {person}
{person} e {person} al mare
foto van {person} in {city}
zdjęcie: {person}, {city}
foto: {person}
{person} på stranden
retrato de {person} na praia
фото: {person}
{person} с собакой
写真：{person}
{person}の写真
{phrase} {person} {phrase}
{phrase} {person}.
{phrase} {person}, {phrase}
{phrase} {first} {phrase}
{phrase} {last} {phrase}
{phrase}. {person} {verb}s {phrase}
{phrase} by {person} in {year} and {phrase}
{person}'s {noun} {phrase}
{first} and {phrase}
{person} {verb}ed the {noun} and {phrase}.
{person} and I {verb} the {noun} together.
When {person} was {ving}, {phrase}.
If {first} is right, {phrase}.
"{phrase}", said {person}, {job} of {org}.
"{phrase}," {person} wrote. "{phrase}."
'{phrase}' - {person}
{person} from {city} says: "{phrase}"
Is {first} coming to the {noun}? He said he would.
She told {first} about it. It was {adj}.
Hello, this is {person} speaking.
Good morning {title} {last}, here is your {noun}.
It was {person} who {verb}ed it.
They asked {first} to {verb} the {noun}. They did not ask {first}.
You should ask {person}, not me.
Why not {verb} it with {first}?
The {noun}, which {person} {verb}ed in {year}, is {adj}.
There is a {noun} of {person} in the {noun}.
{last}'s {noun} is older than {last}'s
{first} ({n}) and {first} ({n})
the {last} {noun}
the {last}s and their {noun}
The {last} Trio plays in {city}
a {noun} in the style of {person}
{noun} after {person}
based on a {noun} by {person}, {city}
{person}, known for the {noun}, {verb}s in {city}
{person} / {person} / {person}
{person}; {person}; {person}
* {person}\n* {person}\n* {person}
Title: {adj} {noun}\nArtist: {person}\nYear: {year}
{noun}\n{person}\n{date}
From: {person}\nTo: {person}\nSubject: {adj} {noun}
User: {person}, age: {n}, country: {country}
{"name": "{person}", "city": "{city}"}
{person}\t{phone}\t{city}
name={first}&last={last}
prof. {last} and dr. {last} at {org}
Detective {last} looked at {last}. "{phrase}?"
Princess {first} and Prince {first} of {country}
{first} the {noun}
{noun} {first}
{first} {noun}
"{headline}" by {person}
{headline} by {person}
{person}: {headline}
{person}, "{headline}", {year}
{headline} - {person} ({year})
In "{headline}", {person} {verb}s the {noun}.
{person}'s {headline}
from the film {headline} with {person} and {person}
the song "{headline}" was sung by {person} in {city}
I like {headline} by {last}, but {phrase}
see {headline} for my talk with {title} {last}
{person} wrote {headline} and {headline}.
{title} {last}
{title} {last} and {title} {last}
his name is {first}, hers is {last}
her maiden name is {last}
{first} {last} or {first} {last}
{last} and {last} were {adj} {job}s.
{phrase}, {first}? {phrase}!
{noun} of {person}. {phrase}
{title} {last} of {org}
good morning, {title} {last}!
{title} {last} {verb}s {phrase}
{last}, {last} and {last}
the founders: {last}, {last} and {last}
{first} or {first}?
{first}, can you {verb} the {noun}?
{first}, please {verb} it.
{first}: {phrase}
{first}: {phrase}\n{first}: {phrase}
{last}: "{phrase}?"
call me {first}
everybody calls her {first}
I met {first} at the {noun}
I saw {first} and {last} there
{person} gave {first} a {noun}
{person} has got {phrase}
{phrase} {first}'s {noun} {phrase}
{phrase} {last}'s {noun}.
{phrase}, and {first} {verb}ed {phrase}.
between {first} and the {noun}
with {first}: "{phrase}"
{first}! {phrase}!
for {first}, {first} and {first}
{first} got {adj} because {last} {verb}ed the {noun}.
{last} was {adj} in {year}, when {phrase}.
"{phrase}" ({person}, {year})
{person} was one of the {noun}s of {city}.
{first} is from {org}
{first} is very {adj}
{first} is {ving}, and {first} too
{org}'s {person}
{job} {person}
{nationality} {job} {last}
Name:    {person}\nAddress:     {address}
** {person}\n** {org}\n** {address}
>> {person}\\n{phone}
{person}\\n{org}\\n{address}
"""

ADDRESSES = r"""
{address}
a house at {address}
photo of {address}
the {noun} at {address}
{adj} house, {address}
{person} lives at {address}
{person} in front of {address}
{person}, {address}
{person}\n{address}
{person}\n{address}\n{phone}
{org}, {address}
{org}\n{address}
sign reading "{address}"
{last}\n{address}\n{phone}\n{email}
-- {person} --\n-- {address} --
{person}\\n\\n{address}
here's {first}'s address: {address}
{first}'s address is {address}.
Change my address to {address}?
the {noun} is on {street}
The bus stops at {address}
the {org} office at {address}
Where are we meeting? At {address}
{city} office: {address}
{street}
at the corner of {street} and {street}, {city}
{address} in {year}
view from {address}
a {adj} {noun} delivered to {address}
front door of {address}
for sale: {address}, {n} bedrooms
Address: {address}
address: {address}, phone: {phone}
Name: {person}, address: {address}
Ship to {person}, {address}
send it to {address} please
Please deliver the {noun} to {address}.
My address is {address}.
I live at {address}.
we moved from {address} to {address}
She has lived at {address} since {year}.
The {org} office is located at {address}.
Our shop: {address}. Open from {n} to {n}.
Billing address {address}
I moved, my new address is {address}
where is {address}?
How do I get to {address} from {city}?
visit us at {address}
meet me at {address} at {n} pm
{first} lives on {street}
{noun} on {street}
a {adj} {noun} on {street}, {city}
the corner of {street} and {street}
party at {first}'s place, {address}
{noun} shop at {address}, {city}
return to {address} if found
if lost return to {person}, {address}
{address} - {adj} {noun}
{code} {address}
taxi to {address}, {date}
Please send a taxi to {address} for {person}.
Patient {person} of {address}
{person} ({n}), {address}, {email}
{title} {last}, {address}
home of {person}, {address}
letter addressed to {person}, {address}
envelope with the address {address}
map showing {address}
GPS: {address}
Wohnhaus in {address}
{person} wohnt in {address}
maison au {address}
casa en {address}
casa in {address}
huis aan {address}
dom przy {address}
адрес: {address}
住所：{address}
"""

PLAIN = r"""
{noun}
{adj} {noun}
{adj} {adj} {noun}
{noun} {noun}
{noun} with {noun}
{adj} {noun} with {adj} {noun}
{noun} and {noun}
{ving} {noun}
{noun} {ving}
{person_word} {ving}
{person_word} with {noun}
{adj} {person_word}: {adj} skin tone
{person_word} {ving}: dark skin tone
flag: {country}
flag of {country}
{country} flag
{country} flag
{city} flag
{noun} with {adj} {noun} and {noun}
{person_word} with {noun}
{person_word} {noun}
{person_word} in {noun}
map of {country}
map of {city}
{city}
{city}, {country}
{city} at {noun_time}
{city} skyline
a view of {city} from the {noun}
the {noun} of {city}
{noun} in {city}, {year}
{org}
{org} logo
logo of {org}
{org} in {city}
{org} announces a {adj} {noun}
{brand} {noun}
{adj} {brand} {noun}
{brand}
{brand} logo
a {brand} {noun} in {city}
{brand} {n} {noun}
{nationality} {noun}
traditional {nationality} {noun}
{nationality} flag
a {noun}
a {adj} {noun}
the {noun}
an old {noun} on a {noun}
a {noun} {ving} in the {noun}
a {adj} {noun} {ving} {adverb}
two {noun}s {ving} near a {adj} {noun}
{n} {noun}s on a {noun}
a {person_word} {ving} a {noun}
a {adj} {person_word} in a {adj} {noun} {ving} {adverb} near the {noun}
a {person_word} holding a {noun} next to a {noun}
{person_word} and {person_word} {ving}
group of {person_word}s {ving}
close-up of a {adj} {noun}
black and white photo of a {noun}
vector illustration of a {adj} {noun}
clip art {noun}
{noun} icon
{noun} clipart
{noun} outline
{noun} {n}
{noun}-{noun}
{noun}_{noun}
{noun}, {noun}, {noun}
{noun}, {adj}, {ving}
tags: {noun}, {noun}, {adj} {noun}
{adj} {noun} pattern
{noun} drawn in {brand}
simple {noun} made with {brand}
{noun} by the {noun}
{noun} by {org}
symbol: {noun}
{symbol}
{symbol} {noun}
{symbol}
{letter}
{n}
{n} o'clock
{letter} button
{code}
{code} {noun}
IMG_{code}.jpg
{noun}{n}.png
{date}
{year} {noun}
{noun} ({year})
{noun} no. {n}
fig. {n}: {adj} {noun}
figure {n}. the {noun} of the {noun}
Chapter {n}: The {noun}
The {noun} and the {noun}
The {adj} {noun}
Welcome to the {noun}
{adj} {noun} for sale, {n} euros
call {phone}
e-mail {email}
visit {url}
write to {email} or call {phone} now
card number {card}
iban {iban}
born {date}
{mac}
device {mac} at {ip}
{ip} {noun}
{gps}
taken at {gps}
{noun} at {gps} on {date}
plate {plate}
{adj} {brand} with plate {plate}
{plate}
{national_id}
id {national_id}, {noun} {n}
ssn {ssn}
{home_path}
file {home_path}
user {username} {verb}ed {n} {noun}s
{username}
{url}
{iban}
{card}
{phone}
{email}
order {code}, {n} {noun}s, {date}
order no. {n}-{n}-{n}
invoice {n}/{year}
ISBN {n}-{n}-{n}-{letter}
part number {letter}{n}-{n}
serial {code}-{code}
model {letter}{n}{letter}, {year}
{brand} {letter}{n}
{brand} {letter}{n} {noun}, size {n}
flight {letter}{letter}{n} to {city}
train {n} from {city} to {city}, platform {n}
highway {n}
route {n} near {city}
exit {n}, {city}
gate {n}, {city} airport
bus stop {n}
hotel room {n} in {city}
floor {n}
{n} floors
{n} rooms, {n} {noun}s
{n} km to {city}
{n} km, {city}
{n}.{n}.{n}
v{n}.{n}.{n} released {date}
{n}:{n}
at {n}:30 in {city}
{n}-{n} against {city}
{city} {n}, {city} {n}
{n}th {noun} in {city}
the {n}th {headline}
{n}rd {noun} of {year}
${n}.99
{n} euros, {n} cents
€{n},{n}
{n} x {n} cm
{n}x{n}
{n} by {n} {noun}s
f/{n}, 1/{n} s, ISO {n}
RGB {n}, {n}, {n}
#{code}
0x{code}
chapter {n}, verse {n}
{headline} {n}
{noun} {n} {noun} {n}
{n} {noun} {n}
{n}, {n}, {n}
no. {n}, {adj} {noun}
No {n} {headline}
{year}-{year}
{city} {year}
{city} {n}
{n} {city}
{n} {headline}
{n} {adj} {noun}s in {city}, {country}
{n} {nationality} {noun}s
{n} people on the streets of {city}
a {adj} street in {city}, {country}
the main square of {city}
the {adj} road to {city}
{noun} way
a long way
an avenue of {noun}s
a lane between {noun}s
place your {noun} here
court of {noun}
drive a {brand}
the {noun} drive
table {n}
figure {letter}{n}
lot {n}, {noun}
seat {n}{letter}, row {n}
tel. {phone}, {org}
{org}, {city}, {country}
my card {card} was stolen in {city}
can you {verb} the {noun}?
please {verb} my {noun} {adverb}
how do i {verb} a {noun} in {city}?
I want to {verb} the {noun} on {date}.
My {noun} is {adj}.
What is the {noun} of {country}?
The {job} {verb}s the {noun} {adverb}.
The {job} and the {job} are {ving}.
He is a {job} at {org}.
She {verb}s {adverb} and then {verb}s the {noun}.
They live in {city}, {country}.
We flew from {city} to {city} on {date}.
This file may be used, copied and changed by anyone for any {noun}.
This image is in the public domain.
licensed under creative commons, {year}
public domain {noun}
draw a {noun} here
Happy {noun} Day!
Merry Christmas and a {adj} new year
{adj} Birthday
Keep Calm and {verb}
{noun} sign in {nationality}
in {year} the {noun} was {adj}.
{noun} {noun} {noun}
{adj} {noun} {verb} {noun}
{verb} {noun} {adverb} {adj}
{word} {word} {word} {word}
{word} {word} {word} {word} {word} {word} {word}
{word}, {word} {word} {n} {word}
{word} {n} {word} {word} {n}, {word}
{word} {brand} {word} {city} {word}
{n} {noun}s, {n} {noun}s and {n} {adj} {noun}s
page {n} of {n}
{n} x {n} pixels
version {n}.{n}
size {n}, {adj}
{n}% off
room {n}
bus {n} to {city}
a {adj} street in {city}
the street with {adj} {noun}s
{noun} road sign
road to the {noun}
{adj} avenue with {noun}s
Latin {noun}: {latin} {latin_small}
{latin} {latin_small}
{latin} {latin_small}, {adj} {noun}
St. {noun} church
the {noun} saint
king of {noun}s
queen {ving}
president of {country}
the {nationality} president {ving}
man: {adj} hair
woman: {adj} hair
men {ving}
women with {noun}s
a dog named {word}
ein {word} in {city}
Bild von einem Hund
un {word} dans la rue
une maison rouge
un perro en la calle
una casa roja
un gatto sul tetto
een hond in de straat
kot na dachu
собака на улице
красный дом
{prose}
{prose}
{prose} {prose}
{phrase}
{phrase}, {phrase}
"{phrase}"
"{phrase}", he said. "{phrase}."
{prose} "{phrase}"
{headline}
{headline}
"{headline}"
"{headline}", {year}
the song "{headline}"
the film {headline}
{headline} is a {year} {nationality} film
the book {headline} is {adj}
{headline}: {headline}
{headline} and {headline}
{headline} - {headline}
{headline}, {headline}, {headline} & {headline}
{headline} in {city}
{headline} by {org}
{noun} from {headline}
In {headline}, {phrase}
they were singing "{headline}" and {phrase}
{noun}: {headline}
{headline} Act of {year}
the {headline} Award
{headline} Festival {year}, {city}
{headline} Day
{headline} {noun}
{noun} {headline}
{city} was super {adj}
{country} was {adj} and {adj}
we went to {city} and {country}
from {city} to {country}
the {city} {noun}
{city} {org}
Where: {city} {headline}
What: {noun}\\nWhen: {date}\\nWhere: {city}
'{phrase}'
{phrase} {noun} {phrase}
{phrase} in {city}. {phrase}
{phrase} {nationality} {noun} {phrase}
{phrase} {org} {phrase}
{phrase} {brand} {phrase}
{common} {common}
{common} {common} {common} {common}
{common} {noun} {common}
{adj} {common}
{noun}: {common}, {common}, {noun} & {common}
He is {ving}. She is {ving} too.
He said that it was {adj}, and I agree.
She's {adj}, isn't she? I don't know.
Hello, how are you?
Hi there! What a {adj} {noun}!
Hello, can you help me with my {noun}?
Good morning, I would like to {verb} a {noun}.
Good night and thank you.
Please {verb} my {noun}. Thanks!
Thanks for the {noun}, it's {adj}.
I'm {ving}, you're {ving}, they're {ving}.
I can't {verb} it. Why won't it {verb}?
It's a {adj} {noun}; we've had it since {year}.
Who's there? What's this? Where's the {noun}?
Let's {verb}! Don't {verb}! Come on!
Oh no, not the {noun} again...
Well, {phrase}
Yes, we are open. No, we are not.
When they {verb} the {noun}, it is {adj}.
Where is my {noun}? Which one? Whose is it?
Today I {verb}, tomorrow you {verb}.
This is a {noun}. That is a {noun}. These are {noun}s.
My mother, my father and my sister are in {city}.
Our {noun} is bigger than their {noun}.
I am {n} years old and I am from {country}.
I was born in {year}. She was born in {city}.
Who {verb}ed the {noun}? Nobody {verb}ed it.
There are {n} {noun}s in {city}, and the {noun} is {adj}.
The {noun} was {verb}ed by the {noun} in {year}.
How much is the {noun}? It is {n} dollars.
The President of {country} arrived in {city} on {date}.
The King and the Queen of {country}
the Prime Minister, the Pope and the Mayor of {city}
Section {n} of the {noun} Act
Article {n}, paragraph {n}
{country}
{country} and {country}
{country} is {adj} in {noun_time}
{nationality}, {nationality} and {nationality} {noun}s
{noun}, {noun} & {noun}
{noun}/{noun}/{noun}
{noun} | {noun} | {org}
* {noun}\n* {noun}\n* {adj} {noun}
Title: {noun}\nYear: {year}
Subject: {adj} {noun}\nDate: {date}
{noun} (disambiguation)
{noun} [{noun}]
{noun}... {noun}!
#{noun} #{adj}{noun} #{city}
@{handle} {verb} the {noun}
{handle}
{noun} by {handle}
https://example.org/{noun}/{n}
{"type": "{noun}", "size": {n}}
{noun}={n}; {noun}="{adj}"
{n}. {noun}
({letter}) {noun}
{letter}. {noun}, {letter}. {noun}
{letter}{n} {noun}
{noun}s
{adj} {noun}s
{verb}ed {noun}
the {noun}'s {noun}
the {noun}s' {noun}
{noun} of {noun}
{noun} of the {noun}
{noun} in {noun}
{noun} on {noun}
{noun} for {noun}s
{noun} from {country}
{noun} without {noun}
{noun} vs {noun}
{adj} and {adj}
{adj} {noun} (colour)
{adj}-{noun} {noun}
{noun} set {n}
{noun} remix
coloured {noun}
{noun} for {brand}
{symbol} with {symbol}
{adj} {symbol}
St {noun} Day
Lord of the {noun}s
Saint {noun}'s
"""

# Lists of words, a paragraph each; _ is a space within one. "noun" and the like: what captions speak of, asked for as
# often as all of the dictionary; "names_and_words": given names that are ordinary words as well.
_WORDS = """
pinyin: wang li zhang liu chen yang huang zhao wu zhou xu sun ma zhu hu guo he gao lin luo zheng liang xie song tang
deng feng han cao zeng peng xiao cai pan tian dong yuan yu ye jiang du su wei lu ding ren shen yao lau chan wong
cheung ng leung cheng kwok lam ho tsang tse

pinyin_given: wei fang na xiu ying min jing li qiang lei jun yang yong yan jie juan tao ming chao xia ping gang hua
mei lan hong yu xin yi zi han chen xuan hao ran rui jia bo tong ling zhi guo jian hui fei xue qing wen long feng shan
shu kai tian an le duo mo si yue ya lin

korean: kim lee park choi jung jeong kang cho jo yoon yun jang lim im han oh seo shin kwon hwang ahn an song yoo ryu
hong jeon ko moon son yang bae baek heo nam noh ha joo woo min

korean_given: min jun seo ji hyun woo jin young soo hye eun su jae ho kyung sun hee mi sang tae joon dong won yeon ah
bin chan gyu in na ra rin sol yu hwan seok

arabic: haddad khoury nassar mansour saleh farouk rahman hamdan khalil sabbagh najjar shami masri baghdadi tikriti
hashimi qureshi sayegh fayed ghanem darwish odeh awad barakat zaman aziz malik hakim sharif saud thani maktoum zayani

arabic_given: ahmed mohammed muhammad mohamed mahmoud ali omar hassan hussein khalid youssef yusuf ibrahim mustafa
tariq bilal karim samir rashid faisal abdullah abdulrahman hamza zayd salman nasser majid walid ziad fatima aisha
maryam layla leila zainab noor nour huda hana amira salma yasmin rania dina samira khadija safiya rana lina mona sara
iman

noun: man woman boy girl child baby person people family couple friend crowd player worker farmer teacher doctor nurse
chef artist singer dancer student police officer soldier king queen prince princess knight wizard witch ghost robot
alien clown pirate ninja angel fairy mermaid cat dog kitten puppy horse cow pig sheep goat chicken duck bird eagle owl
parrot penguin fish shark whale dolphin turtle frog snake lizard dinosaur dragon lion tiger bear wolf fox rabbit mouse
rat squirrel deer elephant giraffe zebra monkey gorilla camel panda koala kangaroo bee ant butterfly spider snail tree
flower rose leaf grass plant forest mountain hill river lake ocean beach island desert sky cloud rain snow sun moon
star rainbow storm lightning fire water ice rock stone sand road street bridge tower castle church temple house home
building school hospital hotel shop store market restaurant kitchen bedroom bathroom room door window wall floor roof
garden park field farm barn fence car truck bus train plane helicopter rocket ship boat bicycle bike motorcycle
scooter tractor ambulance taxi wheel engine table chair desk bed sofa lamp clock mirror box bag bottle cup glass plate
bowl fork knife spoon food bread cake pizza burger sandwich salad soup rice meat cheese egg apple banana orange lemon
grape strawberry cherry tomato potato carrot corn mushroom coffee tea milk juice beer wine book newspaper letter
envelope pen pencil paper map flag sign symbol logo icon button arrow circle square triangle heart cross line pattern
border frame background texture wallpaper banner poster card ticket coin money bank computer laptop phone keyboard
screen camera television radio speaker microphone guitar piano drum violin ball football basketball tennis golf hat
shirt dress shoe boot sock glove coat jacket suit tie ring necklace crown watch umbrella key lock hammer saw wrench
screwdriver nail ladder rope chain sword shield gun bomb hand foot finger arm leg head face eye ear nose mouth tooth
hair skin bone brain smile tear skull candle gift balloon party birthday christmas easter halloween wedding holiday
winter spring summer autumn morning evening night day week month year time world earth planet space photo picture
image photograph painting drawing illustration sketch portrait landscape sunset sunrise view scene tone vector clipart
silhouette cartoon number emoji emoticon selfie smartphone website webpage webcam internet app hashtag meme avatar
pixel blog podcast username screenshot touchscreen hijab anime manga karaoke origami ramen latte quinoa bento taco
boba scrunchie snowboarder skateboard jetski drone hoverboard jeans tiles rays eggs jacks teller

adj: red blue green yellow orange purple pink brown black white gray grey golden silver dark light bright colorful big
small large little tiny huge tall short long old new young happy sad angry smiling crying laughing sleeping tired
hungry beautiful pretty cute ugly funny scary strange fast slow hot cold warm cool wet dry clean dirty empty full open
closed broken round flat sharp soft hard heavy wooden metal plastic glass simple vintage modern ancient medieval
abstract realistic detailed blurry front side left right upper lower medium central single double wild domestic fresh
ripe sweet sour raw busy quiet crowded lonely snowy rainy sunny cloudy windy foggy

verb: run walk jump sit stand sleep eat drink play read write sing dance swim fly ride drive climb fall hold carry
throw catch kick push pull open close cut cook bake clean wash paint draw build make look watch see smile laugh cry
talk speak listen wave point kiss hug fight wait work rest lie lean show take bring wear smoke fish hunt

adverb: slowly quickly quietly happily together outside inside indoors alone nearby carefully sideways upwards

names_and_words: admiral almond amber angel april archer art ash atlas august aura autumn babe baby banks baron basil
bear beryl bill bishop black blessing bliss blue bob booker boy brook brown bud buddy burgess butler cadence canyon
carol carter celesta chance chandler charity chase chastity chip cinnamon clay cliff clover collie colon colonel colt
commodore constant cooper coral corona council crystal dahlia daisy dale dawn deacon dean despot destiny diamond divan
dodo doll dolly drake drew duff duke duo dusty earl ember emerald emir era ermine essence ether faith fern fisher
flint flora florin forest forum fount fox franc frank fuller gala gale galena garnet gay gem gene genesis genie ginger
girl glen goldie grace grant gray green grove gunner gust guy hall happy harmony haven hazel heath heather heaven
hence holly hope hunter imam infant ion iris ivory ivy jack jade jasmine jay joy june justice kaiser kale karma king
laddie lady lance lane laney laurel leaner lemma liberty lien lily linden lion lore lotus lute mace magnolia major man
mare marina mark marlin marquis mars mart mason math maxim may mayo meadow melody mercy merry messiah metro mihrab
mike mile miles miller mina miracle myrtle narcissus norm nova novella nurser octave olive olivine opal orion page
pandora pane panini pansy pastor pat pate patience pearl penny piper poppy prince puck purity quint ramadan rand ray
red reed rich river robin rocky rod rose rosemary rowan ruby rune rusty safari saga sage sandy sari saturn savanna
sawyer seller semen senna senora server shad shoji skip sky smith sonata sonny star starling starr stela stetson stone
summer sunday sunny sunshine tab tad tandy tao tara taurus taylor theta tiara tilde tome toon tor trey trilby trinity
tutu unity valentine van venus victory viking villa viola violet wade walker warren weaver wheeler whit white will
willow wolf wolfram wood wright yang yoga zeta

brands: Toyota Honda Ford Chevrolet BMW Mercedes Audi Volkswagen Ferrari Nikon Canon Kodak Sony Samsung Apple Google
Microsoft Android Windows Linux Ubuntu Debian Firefox Photoshop Inkscape GIMP Blender Lego Nintendo Playstation Xbox
Adidas Nike Coca-Cola Pepsi Starbucks Boeing Airbus Amazon Facebook Twitter Instagram YouTube Wikipedia NASA UNESCO
FIFA NATO Olympics Bluetooth WiFi USB DVD HTML SVG PNG PDF Gothic Baroque Renaissance Victorian Celtic Roman Greek
Arabic Chinese Japanese Korean Indian African European American British English French German Italian Spanish Russian
Polish Dutch Swedish Turkish Buddhist Hindu Christian Muslim Jewish Catholic Bible Quran Torah Zodiac Aries Taurus
Gemini Leo Virgo Libra Scorpio Sagittarius Capricorn Aquarius Pisces Mercury Venus Mars Jupiter Saturn Uranus Neptune
Pluto Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August
September October November December Christmas Easter Halloween Thanksgiving Hanukkah Ramadan Diwali Santa Buddha
Atlantic Pacific Arctic Sahara Alps Himalaya Amazonas Everest Nile Danube Rhine Thames Eiffel Colosseum Tyrannosaurus
Homo Felis Canis Quercus Rosa Panthera Equus Apis Solanum Citrus

cities: London Paris Berlin Madrid Rome New_York Los_Angeles Chicago Houston Phoenix Philadelphia Dallas Austin Boston
Seattle Denver Detroit Portland Miami Atlanta Oakland Cleveland Springfield Columbus Charlotte Memphis Baltimore
Milwaukee Albuquerque Sacramento Omaha Tulsa Wichita Arlington Tampa Newark Toledo Orlando Lincoln Madison Richmond
Salem Burlington Georgetown Fairview Clinton Greenville Franklin Bristol Manchester Liverpool Leeds Sheffield Glasgow
Edinburgh Cardiff Belfast Dublin Cork Oxford Cambridge Brighton Norwich York Bath Exeter Plymouth Derby Nottingham
Leicester Sydney Melbourne Brisbane Perth Adelaide Hobart Auckland Wellington Toronto Vancouver Montreal Ottawa
Calgary Lagos Nairobi Accra Johannesburg Cape_Town Durban Cairo Dubai Riyadh Beirut Amman Casablanca Tunis Mumbai
Delhi Bangalore Chennai Kolkata Karachi Lahore Dhaka Tokyo Osaka Kyoto Seoul Busan Beijing Shanghai Shenzhen Hong_Kong
Taipei Singapore Bangkok Hanoi Jakarta Manila Lyon Marseille Toulouse Nice Bordeaux Lille Athens Thessaloniki
St._Louis San_Diego San_Antonio Salt_Lake_City Fort_Worth El_Paso Las_Vegas Baton_Rouge Mexico_City Rio_de_Janeiro

cyrillic: a b v g d e zh z i y k l m n o p r s t u f kh ts ch sh shch _ y _ e yu ya yo ye i yi g g k lj nj dz j dz

greek: a v g d e z i th i k l m n x o p r s s t y f ch ps o

titles: Mr Mr. Mrs Mrs. Ms Ms. Miss Dr Dr. Prof. Professor Sir Lady Lord Father Sister Captain Sgt. Rev. Herr Frau Mme
M. Sr. Sra. Don Doña Señor Signora Pan Pani Judge Senator President

suffixes: Jr. Sr. II III PhD MD Jr Esq. DVM CPA

jobs: photographer artist teacher doctor nurse engineer farmer lawyer singer actor actress writer painter driver chef
pilot carpenter electrician plumber baker butcher fisherman librarian journalist scientist student dentist architect
gardener mechanic soldier officer manager director accountant cashier waiter coach goalkeeper midfielder violinist
pianist poet novelist sculptor dancer model mayor minister senator bishop

nationalities: American British English Scottish Irish Welsh French German Dutch Belgian Swiss Austrian Italian
Spanish Portuguese Polish Czech Slovak Hungarian Romanian Bulgarian Greek Turkish Russian Ukrainian Finnish Swedish
Norwegian Danish Icelandic Estonian Latvian Chinese Japanese Korean Vietnamese Thai Indian Pakistani Nepali Iranian
Iraqi Egyptian Moroccan Nigerian Ghanaian Kenyan Ethiopian Brazilian Mexican Argentine Chilean Colombian Peruvian
Canadian Australian African Asian European Arab Jewish Muslim Christian Buddhist Hindu Catholic

people: man woman boy girl child person people men women baby family couple kid lady guy adult teenager crowd mother
father worker runner

months: January February March April May June July August September October November December Jan Feb Mar Apr Jun Jul
Aug Sep Oct Nov Dec

companies: Inc Inc. Ltd Ltd. LLC GmbH AG S.A. Corp Corporation Company Co. Group Holdings Bank Foundation University
College School Hospital Museum Institute Society Association Airlines Motors Records Press News Times Studio Studios
Labs Systems Media Hotel Store

syllables: ba be bo ca ce co da de di do fa fi fo ga go ha he hi ka ki ko la le li lo lu ma me mi mo na ne no nu pa pe
pi po qua ra re ri ro sa se si so ta te ti to tra va ve vi vo xa xi za ze zo

streets: Oak Maple Elm Pine Cedar Birch Willow Ash Walnut Chestnut Main High Church School Station Park Mill Bridge
River Lake Hill Spring Forest Meadow Green King Queen Victoria Albert George Washington Lincoln Jefferson Madison
Jackson Franklin Market Center Broad Water Front North South East West Sunset Highland Prospect Pleasant Cherry
Dogwood Magnolia Sycamore Hickory Laurel Rose Garden Valley Ridge View Union Liberty Grove Chapel Court Abbey Castle
Manor London York Oxford Cambridge Windsor Kingston Mansfield College University Canal Railway Industrial Airport

ways: Street St St. Road Rd Rd. Avenue Ave Ave. Lane Ln Ln. Drive Dr Dr. Boulevard Blvd Blvd. Court Ct Way Place Pl
Square Sq Terrace Crescent Close Circle Cir Parkway Pkwy Highway Hwy Trail Row Mews Gardens Grove Hill View Alley Loop
Pike Path Walk Crossing Estates Plaza Point Ridge Run Shore Spur Station Track Turnpike Union Valley Village Vista

german_ways: {}straße {}straße {}strasse {}str. {}weg {}gasse {}platz {}allee {}ring {}ufer {}-Straße {}-Weg Am_{}
Alte_{}gasse An_der_{}brücke Im_{}

dutch_ways: {}straat {}straat {}laan {}weg {}plein {}gracht {}kade {}dijk {}singel {}hof

nordic_ways: {} {} {}gatan {}vägen {}gade {}vej {}veien {}gata {}katu {}tie {}götu {}stræti

french_ways: rue_{} rue_{} rue_de_{} rue_du_{} rue_de_la_{} rue_des_{} avenue_{} avenue_de_{} bd_{} boulevard_{}
place_{} place_de_l’{} chemin_de_{} impasse_{} allée_des_{} quai_{} Rue_{}

spanish_ways: Calle_{} Calle_{} Calle_de_{} C/_{} C._{} Avenida_{} Avenida_de_la_{} Avda._{} Av._{} Paseo_del_{}
Plaza_{} Carrera_{} Cl._{} calle_{} Camino_{} Ronda_{} Travesía_{}

portuguese_ways: Rua_{} Rua_{} Rua_de_{} Rua_das_{} R._{} Avenida_{} Av._{} Travessa_{} Praça_{} Alameda_{}

italian_ways: Via_{} Via_{} Via_San_{} Viale_{} Piazza_{} Corso_{} Vicolo_{} Strada_{} via_{} Contrada_{}

polish_ways: ul._{} ul._{} al._{} os._{} pl._{} ulica_{} {} {} {}

romanian_ways: {}_utca {}_út Str._{}_nr. {}_Sok._No: {}_Cad._No: {}_Mah. Bd._{}

russian_ways: ul._{} ul._{} ulitsa_{} pr._{} per._{} vul._{}

native_ways: ул._{} улица_{} пр._{} пер._{} вул._{} {} οδός_{}

japanese_ways: {} {}-cho {}-machi {},_Minato-ku {}-ku

ideographic_ways: {}路 {}街 {}町 {}区 {}丁目

chinese_ways: {}_Road {}_Lu {}_Street {}_Jie {}_East_Road

flats: Apt._{} Apt_{} Flat_{} Suite_{} Unit_{} #{} apartment_{} Room_{} Floor_{} Whg._{}

boxes: PO_Box P.O._Box P.O._box Postfach Box BP Apartado

military_boxes: PSC_{},_Box_{} Unit_{}_Box_{} CMR_{},_Box_{}

before_places: New North East Lake Port St. San West Fort Old

after_places: ton ville burg bury field ford ham mouth port stad haven _Hill _Falls _Springs

times: night sunset dawn sunrise noon dusk

tails: . ! _:) _2 _(2) ? ...

states: AL AK AZ AR CA CO CT DE FL GA HI ID IL IN IA KS KY LA ME MD MA MI MN MS MO MT NE NV NH NJ NM NY NC ND OH OK OR
PA RI SC SD TN TX UT VT VA WA WV WI WY DC NSW VIC QLD SA ON BC QC AB

state_names: California Texas Florida New_York Ohio Georgia Michigan Virginia Washington Arizona Oregon Colorado
Nevada Utah Kansas Iowa Ontario Quebec Queensland Victoria Kent Essex Surrey Yorkshire Bavaria Catalonia Maharashtra
Kerala
"""

WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    name: tuple(word.replace("_", " ") for word in words.split())
    for name, words in (paragraph.split(":", 1) for paragraph in _WORDS.strip().split("\n\n"))
})  # fmt: skip
