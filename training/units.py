"""Units of measurement: where one ends an answer, and which say the same.

The symbols of the SI are a prefix and a unit, in which a letter's case counts: mW is no MW. A unit is a tuple
of names, those below a fraction's line with a stroke: m/s^2 is (meter, /square, /second).
"""

import re

FUNCTIONS = re.compile(
    r"a?(?:rc)?(?:sin|cos|tan|cot|sec|csc)h?|log|l[ng]|exp|sqrt|pi|inf|infinity|lim|max|min|gcd|lcm|mod|det|and|or"
)
NAMES = {
    name: line.split()[0].replace("-", " ")
    for line in """
        dollar dollars $ usd USD bucks | euro euros € EUR | pound pounds £ GBP lb lbs | cent cents ¢
        yen ¥ JPY | rupee rupees Rs | kilometer kilometers kilometre kilometres km | mile miles mi
        meter meters metre metres m | centimeter centimeters centimetre cm | millimeter mm
        inch inches in | foot feet ft | yard yards | gram grams g | kilogram kilograms kg kgs | milligram mg
        ounce ounces oz | tonne tonnes t | liter liters litre litres L l | milliliter ml mL | gallon gallons
        second seconds s sec secs | minute minutes min mins | hour hours h hr hrs | day days | week weeks
        month months | year years yr yrs | mile-per-hour mph | kilometer-per-hour kph kmh
        degree degrees ° deg | degree-celsius °C Celsius | degree-fahrenheit °F Fahrenheit | kelvin kelvins K
        newton newtons N | newton-meter Nm | joule joules J | watt watts W | volt volts V
        ampere amperes amp amps A | hertz Hz | pascal pascals Pa | ohm ohms Ω | mole moles mol
        electronvolt eV | decibel dB | calorie calories cal
        fluid fl | hectare hectares ha
        square sq squared | cubic cu cubed
    """.replace("\n", "|").split("|")
    for name in line.split()
}
PREFIXES = {
    pair[0]: pair.split()[1]
    for pair in (
        *("f femto", "p pico", "n nano", "μ micro", "m milli", "c centi", "d deci", "h hecto"),
        *("k kilo", "M mega", "G giga", "T tera", "P peta"),
    )
}
SYMBOLS = {  # with the prefixes that they take
    **dict.fromkeys(("m meter", "g gram", "L liter", "l liter"), "fpnμmcdkMGTP"),
    **dict.fromkeys(("s second", "A ampere", "N newton", "J joule", "W watt", "V volt"), "fpnμmkMGTP"),
    **dict.fromkeys(("Hz hertz", "Ω ohm", "F farad", "mol mole", "eV electronvolt"), "fpnμmkMGTP"),
    **dict.fromkeys(("T tesla", "C coulomb", "H henry", "K kelvin"), "fpnμm"),  # kT is a product
    **dict.fromkeys(("Wh watt-hour", "B byte", "b bit", "cal calorie"), "kMGTP"),
    "Pa pascal": "fpnμmhkMGTP",
}
PREFIXED: dict[str, str] = {}
for pair, prefixes in SYMBOLS.items():
    symbol, base = pair.replace("-", " ").split(maxsplit=1)
    for sign, prefix in PREFIXES.items():
        name = prefix + base
        if sign in prefixes:
            PREFIXED[sign + symbol] = name
        british = re.sub(r"(?<=me|li)ter$", "tre", name)
        PREFIXED |= dict.fromkeys((name, f"{name}s", british, f"{british}s"), name)
UNITS = PREFIXED | {"KB": "kilobyte"} | NAMES
PHYSICAL = {*" ".join([*PREFIXED.values(), *SYMBOLS]).split()}
VARIABLES = {"F", "T", "C", "H", "K"}  # that cling to a number and to another letter, as in 2mK

POWERS = {"2": "square", "3": "cubic", "4": "fourth"}
MONEY = ("dollar", "euro", "pound", "cent")
WORD = r"[A-Za-zμΩ°$€£¥¢][A-Za-zΩ'-]*(?:\^\{?-?[1-4]\}?|[²³])?"
JOIN = r"(?:[\s/.()*]|\\cdot(?![a-z]))+"
UNIT = re.compile(rf"(?<=[\d)}}\s\]])\s*\(?({WORD}(?:{JOIN}{WORD})*)[\s.)]*$")
FOLLOWS = re.compile(rf"\s?({WORD})((?:\s?[/·*]\s?{WORD})?)")
SIGNS = ((re.compile(r"\\mu\s*(?=[A-Za-z\\])"), "μ"), (re.compile(r"\\(?:Omega|ohm)(?![A-Za-z])"), "Ω"))


def split(text: str) -> tuple[str, tuple[str, ...]]:
    """A number and its unit. A letter that clings to its number is a variable: 5m, but 5 m."""
    money = re.match(r"(-?)\s*([$€£¥]|USD|EUR|GBP|Rs)\.?\s*(?=[\d.])", text)
    head = text = money[1] + text[money.end() :] if money else text
    signs = text
    for pattern, sign in SIGNS:
        signs = pattern.sub(sign, signs)
    unit: tuple[str, ...] = ()
    if match := UNIT.search(signs):
        words = re.findall(WORD, _words(match[1]))
        number = signs[: match.start()].rstrip()
        clings = signs[len(number)].isalpha()
        whole = match[0].count("(") == match[0].count(")")
        number_is_meant = {*words} - {"squared", "cubed"} and "dozen" not in words
        if whole and number_is_meant and all(_is_unit(word, clings and word == words[0]) for word in words):
            head, unit = number, _names(match[1])
    return head, (*([UNITS[money[2]]] if money else ()), *unit)


def unit_after(sentence: str, start: int, end: int) -> tuple[str, ...]:
    """The unit of a number in a sentence, if it is a known one."""
    money = re.search(r"([$€£¥])\s*\Z", sentence[max(0, start - 9) : start])
    unit: tuple[str, ...] = (UNITS[money[1]],) if money else ()
    match = FOLLOWS.match(sentence, end)
    if match and _bare(match[1]) in UNITS and (match[1] != "in" or not sentence[match.end() :].strip(" .*$")):
        second = re.findall(WORD, match[2])
        whole = all(_bare(word) in UNITS for word in second)
        unit += _names(match[1] + match[2] if whole else match[1])
    return unit


def agree(right: tuple[str, ...], said: tuple[str, ...]) -> bool:
    """A unit may be left out or said in more words, but not be another."""
    if not right or not said:
        return True
    a, b = set(right), set(said)
    other = a ^ b
    rate = any(name[0] == "/" for name in other) and right[0] not in MONEY
    power = any(name.lstrip("/") in POWERS.values() for name in other)
    return (a <= b or b <= a) and not rate and not power and not other & PHYSICAL


def _words(text: str) -> str:
    return re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])", " ", text.replace("\\cdot", " "))


def _bare(word: str) -> str:
    return re.sub(r"\^.*|[²³.]+$", "", word)


def _is_unit(word: str, clings: bool) -> bool:
    bare = _bare(word)
    if clings:
        return bare in UNITS and (
            bare == "Ω" or (len(bare) > 1 and not (len(bare) == 2 and bare[1] in VARIABLES))
        )
    return bare in UNITS or (len(bare) > 2 and bare.islower() and not FUNCTIONS.fullmatch(bare))


def _names(text: str) -> tuple[str, ...]:
    found: list[str] = []
    below = ""
    for part in re.findall(rf"{WORD}|/", _words(text)):
        if part in ("/", "per"):
            below = "/"
            continue
        bare = _bare(part)
        power = re.search(r"\^\{?(-?)(\d)|([²³])", part)
        stroke = "/" if power and power[1] else below
        name = UNITS.get(bare) or (bare[:-1] if bare.endswith("s") else bare)
        if power and (exponent := power[2] or {"²": "2", "³": "3"}[power[3]]) in POWERS:
            found.append(stroke + POWERS[exponent])
        for word in name.split():
            if word == "per":
                stroke = "/"
            else:
                found.append(stroke + word)
    return tuple(found)
