"""The singular of an English noun, as the published CHAIR numbers saw it.

The CHAIR scripts in circulation call `singularize` of pattern.en 3.6 (CLiPS, BSD-3-Clause; its rules go back to Bermi
Ferrer's Inflector, MIT). That package no longer installs, and its slips are part of the numbers: "ties" becomes "ty",
"bus" becomes "bu". This module reproduces the behaviour, slips included; it is not meant as good English.
"""

from __future__ import annotations

import re
from functools import lru_cache

# A word that ends one of these ("is" ends "debris") is returned as it came.
_INVARIABLE = (
    "bison bream breeches britches carp chassis christmas clippers cod contretemps corps debris diabetes djinn "
    "eland elk flounder gallows georgia graffiti headquarters herpes high-jinks homework innings jackanapes "
    "mackerel measles mews mumps news pincers pliers proceedings rabies salmon scissors series shears species "
    "swine swiss trout tuna whiting wildebeest advice bread butter cheese electricity equipment fruit "
    "furniture garbage gravel happiness information ketchup knowledge love luggage mathematics mayonnaise meat "
    "mustard progress research rice sand software understanding water"
)
_UNCHANGED = tuple(_INVARIABLE.split())

# The plural of these is returned as it came too: "collies" stays "collies" and so names no dog.
_IE_NOUNS = (
    "alergie auntie beanie birdie bogie bombie collie cookie cutie doggie eyrie freebie goonie groupie hankie "
    "hippie hoagie hottie indie junkie laddie laramie lingerie meanie newbie nightie oldie pixie quickie "
    "reverie rookie softie sortie stoolie sweetie techie toughie valkyrie veggie weenie yuppie zombie"
)
_IE_PLURALS = tuple(noun + "s" for noun in _IE_NOUNS.split())

# Endings with a singular of their own; any word with the ending is rewritten ("four": "fmy", which names nothing).
_IRREGULAR = {
    **{"people": "person", "children": "child", "men": "man", "geese": "goose", "oxen": "ox", "feet": "foot"},
    **{"teeth": "tooth", "leaves": "leaf", "loaves": "loaf", "helves": "helve", "turves": "turf", "beeves": "beef"},
    **{"axes": "axe", "moves": "move", "monies": "money", "our": "my", "kine": "cow", "brethren": "brother"},
    **{"atlases": "atlas", "atlantes": "atlas", "corpora": "corpus", "corpuses": "corpus", "genera": "genus"},
    **{"genii": "genie", "ganglia": "ganglion", "ephemerides": "ephemeris", "mongooses": "mongoose", "zoa": "zoon"},
    **{"mythoi": "mythos", "numena": "numen", "occipita": "occiput", "octopodes": "octopus", "opera": "opus"},
    **{"opuses": "opus", "penes": "penis", "penises": "penis", "sexes": "sex", "soliloquies": "soliloquy"},
    **{"testes": "testis", "trilbys": "trilby"},
}

# (ending, letters to cut, letters to add), the first that fits. A dot stands for any letter that must be there.
_ENDINGS = tuple(
    (re.compile(ending + r"\Z"), cut, add)
    for ending, cut, add in (
        (".ae", 1, ""),
        (".itis", 0, ""),
        (".eaux", 1, ""),
        ("quizzes", 3, ""),
        ("matrices", 3, "x"),
        ("(?:ap|vert|ind)ices", 4, "ex"),
        ("(?:alias|status)es", 2, ""),
        ("[octp|vir]i", 1, "us"),
        ("(?:cris|ax|test)es", 2, "is"),
        ("shoes", 1, ""),
        ("oes", 2, ""),  # canoes: "cano"
        ("buses", 2, ""),
        ("[ml|]ice", 3, "ouse"),  # mice, and police: "polouse"
        ("(?:x|ch|ss|sh)es", 2, ""),
        ("movies", 1, ""),
        (".ombies", 1, ""),
        ("series", 0, ""),
        ("(?:[^aeiouy]|qu)ies", 3, "y"),  # puppies: "puppy", and ties: "ty"
        ("[aeo]lves", 3, "f"),
        ("[^d]eaves", 3, "f"),
        ("arves", 3, "f"),
        ("erves", 1, ""),
        ("[nlw]ives", 3, "fe"),
        ("[lr]ves", 3, "f"),
        ("[aeo]ves", 1, ""),
        ("(?:si|ti|hi)ves", 1, ""),
        ("[^f]ves", 3, "fe"),
        ("(?:analy|ba|diagno|parenthe|progno|synop|the)ses", 2, "is"),
        (".opses", 2, "is"),
        (".yses", 2, "is"),
        ("(?:h|d|r|o|n|b|cl|p)oses", 1, ""),
        (".oses", 2, "is"),
        ("[ti]a", 1, "um"),  # pita: "pitum"
        ("news", 0, ""),
        ("s", 1, ""),  # everything else loses a final s, plural or not
    )
)


@lru_cache(maxsize=65536)
def singularize(word: str) -> str:
    """The singular of one lower-case token; a token that needs no change comes back as it is."""
    if word.endswith("'"):
        return singularize(word[:-1]) + "'s"
    if any(kept.endswith(word) for kept in _UNCHANGED) or word.endswith(_IE_PLURALS):
        return word
    for plural, singular in _IRREGULAR.items():
        if word.endswith(plural):
            return word[: -len(plural)] + singular
    for ending, cut, add in _ENDINGS:
        if ending.search(word):
            return word[: len(word) - cut] + add
    return word
