"""Quantities such as "14M" and "4.2G"."""

import re
from decimal import Decimal

from sret_cli.runtime.errors import SretError

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_quantity(value: str | int | float) -> int:
    """The whole number for a string such as "14M" or "4.2G", or for a plain number.

    Raises:
        SretError: the value is neither of these, or less than 1.
    """
    text = "" if isinstance(value, bool) else str(value).strip().upper()
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)([KMGT]?)", text)
    if not match:
        raise SretError(
            f"{value!r} is not a quantity; write a positive number, if useful with K, M, G or T "
            "(10^3, 10^6, 10^9, 10^12) after it: 14M, 4.2G"
        )
    quantity = round(Decimal(match[1]) * SUFFIXES[match[2]])
    if quantity < 1:
        raise SretError(f"{value!r} is rounded to {quantity}; give 1 or more, such as 14M or 4.2G")
    return quantity
