"""Personal data with a form that can be confirmed: addresses, payment cards, bank accounts, identity numbers of the US
and China, telephone numbers.

Check digits, the structure of account numbers and the numbering plans come from python-stdnum and phonenumbers.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from math import gcd
from typing import Any

import regex

from falcon_kit.display.errors import require
from falcon_kit.guardrails.matching import Pattern
from falcon_kit.guardrails.words import UNSPACED


def _run(part: str, least: int, most: int, border: str) -> str:
    """As many parts as there are, up to `most`; after fewer stands a border, so that there is one way to match."""
    return rf"(?:(?:{part}){{{most}}}|(?:{part}){{{least},{most - 1}}}(?={border}))"


_EMAIL = r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,24}(?=[^A-Za-z0-9-])"
_CARD = (  # 4-4-4-4 and 4-6-5 in one spelling of the gaps, or all digits together
    r"(?<!\d)(?:\d{4}([ .-])\d{4}\1\d{4}\1\d{4}|3\d{3}([ .-])\d{6}\2\d{4,5}|\d{13,19})(?=\D)"
)
_IBAN = r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}" + _run(r" ?[A-Z0-9]", 11, 30, r"[^A-Z0-9 ]| [^A-Z0-9]")
_SSN = r"(?<![\d-])\d{3}-\d{2}-\d{4}(?=[^\d-]|-\D)"
_IDENTITY_CARD = r"(?<![A-Za-z0-9])\d{6}( ?)\d{8}\1\d{3}[\dXx](?=[^A-Za-z0-9])"
_IN_WORD = rf"[^\W{UNSPACED}]"  # in scripts without spaces, a number may stand beside a letter
_INTERNATIONAL = rf"(?<!{_IN_WORD}|\+)\+\d" + _run(
    r"[ ().-]{0,3}\d", 6, 15, r"[^\d ().-]|[ ().-]{1,3}[^\d ().-]|[ ().-]{4}"
)
_SHORTEST = 7  # digits: fewer are as likely a price
_NATIONAL = (  # digits with single gaps, which are no part of an identifier, a decimal or an amount of money
    rf"(?<!{_IN_WORD}|[+(.,/$€£¥-])(?<!\d[ :]|[$€£¥] )\(?\d"
    + _run(
        r"(?:[ -]?\(|\) ?|[ ./-])?\d",
        *(_SHORTEST - 1, 15),
        r"[^\d ()./,%$€£¥-]|[ -](?:[^\d(%$€£¥]|[%$€£¥]\d|\(\D)|[./,]\D|\)(?: \D|[^\d ])|\(\D",
    )
)
_OTHER_NUMBER = regex.compile(
    r"(?:19|20)\d\d([ .-])[01]\d\1[0-3]\d|[0-3]\d([ .-])[01]\d\2(?:19|20)\d\d"  # a date
    r"|(?:(?:[1-9]?\d|[12]\d\d)(?:\.|$)){4}"  # an address of the internet
    r"|\d+\.\d+|0[ .-].*|(?=.*\.).*-.*"  # a decimal, a range from 0, the number of a clause
)
_AMOUNT = regex.compile(r"[1-9]\d{0,2}(?: \d{3})+|.*\..*")
"""An amount or a version, unless its groups are those of a telephone number."""
_UNIT = 32
"""Numbers of one list share a divisor of this size: "256 512 1024", "320 640 1280", "500 750 1000". With a smaller one,
more telephone numbers would count as lists."""
_ISSUERS = {  # first digits, and the lengths of a card's number
    ("4",): (13, 16, 19),
    (*map(str, range(51, 56)), *map(str, range(2221, 2721))): (16,),
    ("34", "37"): (15,),
    ("6011", "65", *map(str, range(644, 650))): (16, 19),
    ("36", "38", "39", *map(str, range(300, 306))): (14,),
    tuple(map(str, range(3528, 3590))): (16,),
    ("62",): (16, 17, 18, 19),
}


def is_card(value: str) -> bool:
    """Whether the digits are a payment card's: the first digits and length of an issuer, and the check digit."""
    from stdnum import luhn

    digits = "".join(filter(str.isdigit, value))
    issued = any(digits.startswith(first) and len(digits) in lengths for first, lengths in _ISSUERS.items())
    return issued and bool(luhn.is_valid(digits))


def is_iban(value: str) -> bool:
    """Whether the text begins with an account number of the structure of its country, with its check digits."""
    from stdnum import iban

    return any(iban.is_valid(each) for each in _beginnings(value))


def is_social_security_number(value: str) -> bool:
    """Whether a number of the form 000-00-0000 can have been issued in the United States."""
    from stdnum.us import ssn

    return bool(ssn.is_valid(value))


def is_identity_card(value: str) -> bool:
    """Whether the number is one of a Chinese identity card: with a place, a date of birth and the check digit."""
    from stdnum.cn import ric

    return bool(ric.is_valid(value.replace(" ", "")))


def is_international_number(value: str) -> bool:
    """Whether the text begins with "+", a country code and a number of its numbering plan."""
    return any(_is_valid(number, None) for number in _beginnings(value))


def _is_valid(number: str, region: str | None) -> bool:
    """Whether the digits are those of a numbering plan: of a region, or of the country whose code they begin with."""
    import phonenumbers

    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
    except phonenumbers.NumberParseException:
        return False


def is_national_number(value: str, regions: Sequence[str]) -> bool:
    """Whether the text is a telephone number of a region: its digits, and the groups that they are written in.

    The groups are those of the region. A mobile number, or one with a first 0, may have others, unless they look like
    an amount, a date or a version. Without groups only a mobile number of the region itself counts: other digits are as
    likely an order number. What follows after a space is left aside if the number itself has a first 0 or other signs
    than spaces.
    """
    value = value if ")" in value else value.removeprefix("(")
    heads = [value[:place] for place, each in enumerate(value) if each == " " and place >= _SHORTEST]
    heads = [each for each in heads if each[0] == "0" or not each.replace(" ", "").isdigit()]
    return any(_is_of_region(number, region) for number in (value, *heads) for region in regions)


def _is_of_region(number: str, region: str) -> bool:
    from phonenumbers import Leniency, PhoneNumberMatcher, PhoneNumberType, number_type, region_code_for_number

    def match(leniency: int) -> Any:
        found = next(iter(PhoneNumberMatcher(number, region, leniency)), None)
        return found.number if found and found.raw_string == number else None

    if _OTHER_NUMBER.fullmatch(number) or _is_list(number):
        return False
    if not _is_valid(number, region) or not (found := match(Leniency.VALID)):
        return False
    is_mobile = number_type(found) == PhoneNumberType.MOBILE
    if number.isdigit():  # +1 is also the code of countries whose mobile numbers can be told from others
        return is_mobile and region_code_for_number(found) == region
    if (is_mobile or regex.match(r"\(?0\d", number)) and not _AMOUNT.fullmatch(number):
        return True
    return match(Leniency.STRICT_GROUPING) is not None


def _is_list(number: str) -> bool:
    """Whether the groups are numbers of a list: three or more between spaces that grow in multiples of one unit.

    One in 5,000 numbers of the US in the spelling 202 555 0143 is such a list, and is not found in this spelling.
    """
    groups = number.split(" ")
    if len(groups) < 3 or not all(each.isdecimal() and each[0] != "0" for each in groups):
        return False
    numbers = [*map(int, groups)]
    return all(one < two for one, two in pairwise(numbers)) and gcd(*numbers) >= _UNIT


def _beginnings(value: str) -> Iterator[str]:
    """The whole text, and its beginnings up to a gap."""
    yield value
    for place in range(len(value) - 1, 4, -1):
        if not value[place].isalnum():
            yield value[:place]


def personal_patterns(regions: Sequence[str]) -> Iterator[Pattern]:
    """The patterns of this check; numbers without "+" are telephone numbers of these regions.

    Raises ValueError for a region without a numbering plan.
    """
    from phonenumbers import SUPPORTED_REGIONS

    codes = [each.upper() for each in regions]
    unknown = [each for each in codes if each not in SUPPORTED_REGIONS]
    require(not unknown, f'phone_regions={regions!r}: there is no region {", ".join(unknown)}; an example is "US"')
    yield Pattern("personal_data", "an email address", _EMAIL)
    yield Pattern("personal_data", "a payment card number", _CARD, valid=is_card)
    yield Pattern("personal_data", "a bank account number (IBAN)", _IBAN, valid=is_iban)
    yield Pattern("personal_data", "a US social security number", _SSN, valid=is_social_security_number)
    yield Pattern("personal_data", "a Chinese identity card number", _IDENTITY_CARD, valid=is_identity_card)
    yield Pattern("personal_data", "a telephone number", _INTERNATIONAL, valid=is_international_number)
    if codes:
        national = partial(is_national_number, regions=codes)
        yield Pattern("personal_data", "a telephone number", _NATIONAL, valid=national)
