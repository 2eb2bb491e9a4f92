"""Every bound of the coordinator, with the reason for its value. Times are seconds."""

from __future__ import annotations

from typing import Final

from lumaris_protocol.limits import ENVELOPE_BYTES_MAX
from lumaris_protocol.money import NANOS_PER_CREDIT

# A claim encloses two agreements, a grant, a voucher and two closes, base64 in JSON.
BODY_BYTES_MAX: Final = 5 * ENVELOPE_BYTES_MAX
# A peer on a slow line sends 320 KiB in this time at 32 kB/s; a stalled one frees its slot.
BODY_READ_S_MAX: Final = 10.0

# Operations waiting for the writer: at 10,000 a second the last one waits 0.2 s.
WRITER_QUEUE_MAX: Final = 2_048
# Beyond some hundred operations a larger batch no longer pays; it only delays the first of it.
WRITER_BATCH_MAX: Final = 512
# A disk that needs longer than this for a commit is broken; the caller may repeat its request.
WRITE_S_MAX: Final = 30.0
LOCK_WAIT_S: Final = 5.0
RETRY_AFTER_S: Final = 1

CERTIFICATE_LIFETIME_S: Final = 24 * 3600
# A shard map is good for newcomers for a day; signing it costs little, so it is never old.
SHARD_MAP_SIGNED_S: Final = 24 * 3600
SHARD_MAP_RENEWED_S: Final = 3600
# Enough for a few programs of one peer; the oldest token goes when another is made.
TOKENS_PER_PEER_MAX: Final = 8
# A registration costs a stranger nothing but a key, so the table of peers has an end.
PEERS_MAX: Final = 1_000_000
BOOTSTRAP_ADDRESSES_MAX: Final = 16
# Several sellers are worth more to a newcomer than several addresses of one.
BOOTSTRAP_ADDRESSES_PER_PEER: Final = 2
REQUEST_CREDIT_LIFETIME_S: Final = 300
# What is credited is kept for ever, so a credit must be worth its row: a thousandth of a credit.
CREDIT_NANOS_MIN: Final = NANOS_PER_CREDIT // 1_000
# The default limit of test credit in whole credits; nobody needs to ask for it in smaller parts.
CREDITS_PER_ACCOUNT_MAX: Final = 1_000

# A grant is some 18 kB that are never deleted: it must bind money, or an account without any could
# fill the disk. At a seller's default prices this is the start of one order.
CAP_NANOS_MIN: Final = 1_000
# One buyer's share of what is open, some 5 MB; a program that rents more settles some first.
ESCROWS_OPEN_PER_BUYER_MAX: Final = 256

CHORES_EVERY_S: Final = 60.0
# One round of expiry at most: the rest follows in the next round, so grants are never starved.
EXPIRIES_PER_ROUND_MAX: Final = 1_024
EXPIRIES_PER_BATCH: Final = 64

# A slow audit is repeated after ten times the time it took, so it takes a tenth of a core at most.
AUDIT_FAST_S: Final = 0.1
AUDIT_REST_FACTOR: Final = 10
TRANSFERS_PAGE_MAX: Final = 100
BAD_DOCUMENTS_REMEMBERED_MAX: Final = 1_024
# A flood of different bad documents must not become a flood of log lines.
BAD_DOCUMENTS_LOGGED_PER_ROUND_MAX: Final = 100
# A request's head is a few hundred bytes: a peer that cannot send it in this time is not one.
HEAD_S_MAX: Final = 15.0
# Connections, idle ones included: each costs a socket and some kilobytes.
REQUESTS_CONCURRENT_MAX: Final = 1_024
SHUTDOWN_S_MAX: Final = 5
