"""Quantities such as "14M" and "4.2G"."""

import re
from decimal import Decimal

from sret_cli.runtime.errors import SretError

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_quantity(value: str | int | float) -> int:
    """The whole number that a text such as "14M" or "4.2G" stands for, or a plain number.

    Raises:
        SretError: it is neither, or comes to less than 1.
    """
    text = "" if isinstance(value, bool) else str(value).strip().upper()
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)([KMGT]?)", text)
    if not match:
        raise SretError(
            f"{value!r} is no quantity; write a positive number, with K, M, G or T behind it for "
            "thousands to millions of millions: 14M, 4.2G"
        )
    quantity = round(Decimal(match[1]) * SUFFIXES[match[2]])
    if quantity < 1:
        raise SretError(f"{value!r} comes to {quantity}; give 1 or more, such as 14M or 4.2G")
    return quantity
