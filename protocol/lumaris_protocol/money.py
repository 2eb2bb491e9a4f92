"""Money is an integer number of nanos: 1 credit = 1,000,000,000 nanos."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Final, NewType

from lumaris_protocol.limits import FEE_BPS_MAX, NANOS_MAX

Nanos = NewType("Nanos", int)

NANOS_PER_CREDIT: Final = 1_000_000_000
TEST_CURRENCY: Final = "TEST"
_ONE_NANO: Final = Decimal("1e-9")


def parse_credits(text: str) -> Nanos:
    """Nanos of a decimal number of credits such as `0.02`.

    Raises ValueError when it is not a number, is negative, too large, or finer than a nano.
    """
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r} is not an amount of credits") from None
    if not amount.is_finite() or amount < 0 or amount > NANOS_MAX // NANOS_PER_CREDIT:
        raise ValueError(f"{text!r} is out of range for an amount of credits")
    # Quantizing is exact where multiplying would round a very long number to a whole nano.
    rounded = amount.quantize(_ONE_NANO)
    if rounded != amount:
        raise ValueError(f"{text!r} is finer than a nano (nine decimals)")
    return Nanos(int(rounded * NANOS_PER_CREDIT))


def format_credits(nanos: int) -> str:
    """Credits with all nine decimals, exact to the nano."""
    sign = "-" if nanos < 0 else ""
    whole, rest = divmod(abs(nanos), NANOS_PER_CREDIT)
    return f"{sign}{whole}.{rest:09d}"


def split_fee(amount_nanos: int, *, fee_bps: int) -> tuple[Nanos, Nanos]:
    """(seller's part, fee) of an amount; the fee is floored and the seller gets the rest."""
    if not 0 <= fee_bps <= FEE_BPS_MAX or amount_nanos < 0:
        raise ValueError("fee_bps or amount out of range")
    fee = amount_nanos * fee_bps // FEE_BPS_MAX
    return Nanos(amount_nanos - fee), Nanos(fee)


def bond_band(nanos: int) -> int:
    """How large a bond is, in powers of ten: 0 below one credit, 1 from one, 2 from ten, ..."""
    return len(str(nanos // NANOS_PER_CREDIT)) if nanos >= NANOS_PER_CREDIT else 0
