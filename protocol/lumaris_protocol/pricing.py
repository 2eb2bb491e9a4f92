"""Prices: from a price table and reserved resources to the nanos of an order.

All roundings favour the buyer by less than one nano for each order: rates are floored once, and an
order's time is billed in milliseconds, floored.
"""

from __future__ import annotations

from collections.abc import Callable

from lumaris_protocol.limits import GIB, NANOS_MAX
from lumaris_protocol.messages.advert import PriceTable, Resources
from lumaris_protocol.messages.negotiation import PriceTerms
from lumaris_protocol.money import Nanos

_MILLIS_PER_CORE = 1000
_MS_PER_S = 1000
# How much unpaid work a seller carries: this many seconds of the rate, and this many start fees.
EXPOSURE_S = 10
EXPOSURE_STARTS = 8
VOUCHER_INTERVAL_S = 5


def rate_of(resources: Resources) -> Callable[[PriceTable], Nanos]:
    """What reserving `resources` costs for each second that an order runs, by price table.

    A search prices hundreds of tables for the same resources, so those are taken apart once.
    """
    cpu_millis, memory_bytes = resources.cpu_millis, resources.memory_bytes
    disk_bytes, gpus = resources.disk_bytes, sum(gpu.count for gpu in resources.gpus)

    def rate(prices: PriceTable) -> Nanos:
        total = (
            prices.cpu_core_s_nanos * cpu_millis // _MILLIS_PER_CORE
            + prices.memory_gib_s_nanos * memory_bytes // GIB
            + prices.disk_gib_s_nanos * disk_bytes // GIB
            + prices.gpu_s_nanos * gpus
        )
        return Nanos(total if total < NANOS_MAX else NANOS_MAX)

    return rate


def rate_nanos_per_s(prices: PriceTable, resources: Resources) -> Nanos:
    """What reserving `resources` costs for each second that an order runs."""
    return rate_of(resources)(prices)


def lease_of(resources: Resources, lease_s: int) -> Callable[[PriceTable], Nanos]:
    """What one order that runs for the whole lease costs, by price table; see `rate_of`."""
    rate = rate_of(resources)

    def lease(prices: PriceTable) -> Nanos:
        whole = prices.start_nanos + rate(prices) * lease_s
        return Nanos(whole if whole < NANOS_MAX else NANOS_MAX)

    return lease


def lease_nanos(prices: PriceTable, resources: Resources, lease_s: int) -> Nanos:
    """What one order that runs for the whole lease costs: the figure offers are compared by."""
    return lease_of(resources, lease_s)(prices)


def terms_for(
    prices: PriceTable, resources: Resources, *, lease_s: int, cap_nanos: int
) -> PriceTerms:
    """The terms a seller quotes: its table applied to the request, capped as the buyer asked."""
    rate = rate_nanos_per_s(prices, resources)
    exposure = rate * EXPOSURE_S + prices.start_nanos * EXPOSURE_STARTS
    return PriceTerms(
        currency=prices.currency,
        start_nanos=prices.start_nanos,
        rate_nanos_per_s=rate,
        cap_nanos=cap_nanos or lease_nanos(prices, resources, lease_s),
        exposure_nanos=min(exposure, NANOS_MAX),
        voucher_interval_s=VOUCHER_INTERVAL_S,
    )


def order_nanos(terms: PriceTerms, wall_ms: int) -> Nanos:
    """The price of an order that ran for `wall_ms`."""
    return Nanos(min(terms.start_nanos + terms.rate_nanos_per_s * wall_ms // _MS_PER_S, NANOS_MAX))
