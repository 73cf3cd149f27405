"""Text as detectors see it: characters that look like others are those, and invisible ones are gone."""

from __future__ import annotations

import functools
import re
import unicodedata

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def fold(text: str) -> tuple[str, range | list[int]]:
    """The text as detectors see it, and for each of its characters the place it has in `text`."""
    if text.isascii():
        return text, range(len(text))
    pieces: list[str] = []
    moved: list[tuple[int, int]] = []  # where a character became none, or several
    done = 0
    for match in _NOT_ASCII.finditer(text):
        plain = _plain(match[0])
        if plain != match[0]:
            place = match.start()
            pieces += (text[done:place], plain)
            done = place + 1
            if len(plain) != 1:
                moved.append((place, len(plain)))
    folded = "".join((*pieces, text[done:]))
    if not moved:
        return folded, range(len(text))
    places: list[int] = []
    done = 0
    for place, length in moved:
        places += range(done, place)
        places += [place] * length
        done = place + 1
    places += range(done, len(text))
    return folded, places


@functools.lru_cache(4096)
def _plain(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("Cf", "Mn"):  # zero-width joiners, soft hyphens, combining marks
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Pd" or character == "\N{MINUS SIGN}":
        return "-"
    if category == "Zs":
        return " "
    return unicodedata.normalize("NFKC", character)
