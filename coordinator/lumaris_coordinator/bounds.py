"""Every bound of the coordinator, with the reason for its value. Times are seconds."""

from __future__ import annotations

from typing import Final

from lumaris_protocol.limits import (
    DISPUTE_DOCUMENT_BYTES_MAX,
    ENVELOPE_BYTES_MAX,
    REFUNDED_ORDERS_MAX,
    SETTLE_WINDOW_S_MAX,
)
from lumaris_protocol.money import NANOS_PER_CREDIT

# The largest is a bundle of evidence; a claim with all that it encloses is 64 KiB.
BODY_BYTES_MAX: Final = DISPUTE_DOCUMENT_BYTES_MAX
# A peer on a slow line sends 512 KiB in this time at 52 kB/s; a stalled one frees its slot.
BODY_READ_S_MAX: Final = 10.0

# Operations waiting for the writer: at 10,000 a second the last one waits 0.2 s.
WRITER_QUEUE_MAX: Final = 2_048
# Beyond some hundred operations a larger batch no longer pays; it only delays the first of it.
WRITER_BATCH_MAX: Final = 512
# Operations that the event loop runs before it looks at its connections again; each takes about a
# third of a millisecond.
OPERATIONS_PER_TURN_MAX: Final = 16
# The oldest one waits longer than that only when the disk or the database stands still. A few are
# let in all the same: one slow sync on an idle machine is no reason to refuse anybody.
WRITER_STALLED_S: Final = 0.25
WRITER_STALLED_QUEUE_MAX: Final = 64
# A batch that could not begin is tried again for as long as a database server takes to restart.
WRITE_AGAIN_S_MAX: Final = 10.0
# Pauses between attempts on a database that fails: each is twice the last, up to the greatest.
WRITER_REST_S: Final = 0.05
WRITER_REST_S_MAX: Final = 2.0
# A disk that needs longer than this for a commit is broken; the caller may repeat its request.
WRITE_S_MAX: Final = 30.0
LOCK_WAIT_S: Final = 5.0
# A database server that is there answers a connection at once.
DATABASE_CONNECT_S_MAX: Final = 5
# Statements on their way to a database server, and what they carry: beyond some tens of them a
# round trip costs nothing any more, and both sides keep their answers in memory.
PIPELINE_MAX: Final = 1_024
PIPELINE_BYTES_MAX: Final = 4 * 1024 * 1024
# The server starts on what it has while we make the rest.
PIPELINE_FLUSH: Final = 32
# The statements of the rooms are some two hundred; those that are made on the way go unprepared.
PREPARED_MAX: Final = 512
# Readers of a database server: more threads than this would only wait for the interpreter.
DATABASE_READERS_MAX: Final = 4
# Less free space than this is told by /readyz, hours before a full disk refuses writes.
DISK_FREE_BYTES_MIN: Final = 256 * 1024 * 1024
# A row holds a few documents; its line is theirs in base64.
BACKUP_LINE_BYTES_MAX: Final = 64 * ENVELOPE_BYTES_MAX
# More events than any coordinator makes in the days between a backup and its restore; the numbers
# stay below 2^53 after thousands of restores.
RESTORE_SKIPS: Final = 10**12
# Who sees this many problems will not read more of them.
CHECK_FINDINGS_MAX: Final = 100
# A configuration is a page of text.
CONFIG_BYTES_MAX: Final = 64 * 1024
RETRY_AFTER_S: Final = 1

CERTIFICATE_LIFETIME_S: Final = 24 * 3600
# A receipt may be settled 400 days after its agreement: its key is there for twice as long.
SIGNING_KEY_LIFETIME_S: Final = 2 * SETTLE_WINDOW_S_MAX
# Certificates are renewed within a day, and the key list is fetched with them.
KEY_STARTS_AFTER_S: Final = CERTIFICATE_LIFETIME_S + 3600
KEY_ENDS_SOON_S: Final = 30 * 24 * 3600
# A shard map is good for newcomers for a day; signing it costs little, so it is never old.
SHARD_MAP_SIGNED_S: Final = 24 * 3600
SHARD_MAP_RENEWED_S: Final = 3600
# Enough for a few programs of one peer or user; the oldest token goes when another is made.
TOKENS_PER_HOLDER_MAX: Final = 8
USER_TOKEN_LIFETIME_S: Final = 12 * 3600
# A user costs a stranger a password's hash, some 100 ms of our CPU, so their table has an end too.
USERS_MAX: Final = 100_000
PEERS_PER_USER_MAX: Final = 64
PEER_LINK_LIFETIME_S: Final = 300
# A user that never owned a peer, a key or money is forgotten: strangers must not fill the table.
USER_FORGOTTEN_S: Final = 30 * 24 * 3600
USERS_LOOKED_AT_PER_ROUND: Final = 1_000
# Expired tokens and challenges: one transaction's share, some milliseconds, and a round's.
IDENTITY_PRUNED_AT_ONCE_MAX: Final = 1_000
IDENTITY_PRUNED_PER_ROUND_MAX: Final = 100_000
# Each hash takes 64 MiB and a tenth of a second of a core; two leave the other cores to the market.
PASSWORDS_AT_ONCE_MAX: Final = 2
REGISTRATIONS_AT_ONCE_MAX: Final = 1
# The last of them waits some 2 s; more are told to come back. Of one caller some wait at most: an
# office that logs in together.
PASSWORDS_WAITING_MAX: Final = 32
PASSWORDS_PER_CALLER_MAX: Final = 8
API_KEYS_PER_USER_MAX: Final = 32
OPERATORS_MAX: Final = 100  # that a list shows
API_KEY_LIFETIME_S: Final = 90 * 24 * 3600
API_KEY_LIFETIME_S_MAX: Final = 400 * 24 * 3600
# A rotated key is good for a day more: time to carry the new one to every machine.
API_KEY_OVERLAP_S: Final = 24 * 3600
# "Last used" is a help for tidying up; an hour's grain makes it one write an hour.
API_KEY_USED_GRAIN_S: Final = 3600
REVOCATIONS_PER_REQUEST_MAX: Final = 64

# Rates are requests a second. One address may hold a house or a small farm of sellers.
ADDRESS_RATE: Final = 100.0
ADDRESS_BURST: Final = 500
# A seller knocks twice a day; a farm of a hundred behind one address starts within seconds.
DOOR_RATE: Final = 10.0
DOOR_BURST: Final = 250
# An address has so many new users at once, and some a day more: a family, or an office's first day.
REGISTRATION_RATE: Final = 20 / (24 * 3600)
REGISTRATION_BURST: Final = 10
CREDENTIAL_RATE: Final = 50
CREDENTIAL_BURST_S: Final = 4
API_KEY_RATE_MAX: Final = 500
# A name guessed at from one address: 5 times, then once in half a minute.
LOGIN_FAILURES_RATE: Final = 1 / 30
LOGIN_FAILURES_BURST: Final = 5
LOGIN_FAILURES_PER_ADDRESS_RATE: Final = 1 / 10
LOGIN_FAILURES_PER_ADDRESS_BURST: Final = 20
# From everywhere together: high, because strangers who fail on purpose lock the owner out as well.
LOGIN_FAILURES_PER_NAME_RATE: Final = 1 / 10
LOGIN_FAILURES_PER_NAME_BURST: Final = 100
# Of each kind of bucket; some 200 bytes each.
BUCKETS_MAX: Final = 50_000
# Addresses whose text was taken apart lately: some for each connection that may be open.
ADDRESSES_REMEMBERED_MAX: Final = 4_096
PROXIES_MAX: Final = 16
# The coordinator's own certificate authority; its client certificates live a day.
AUTHORITY_LIFETIME_S: Final = 10 * 365 * 24 * 3600
# The certificate that the coordinator makes for itself; another one is made at half of it.
SERVER_CERTIFICATE_LIFETIME_S: Final = 14 * 24 * 3600
TLS_NAMES_MAX: Final = 16
# A connection counts for no bound of the server until it has shaken hands: asyncio waits a minute.
TLS_HANDSHAKE_S_MAX: Final = 10.0
# How soon a certificate file that was replaced is served.
TLS_LOOK_EVERY_S: Final = 30.0
RSA_BITS_MIN: Final = 2_048
# A larger one costs every handshake more than it costs its owner.
RSA_BITS_MAX: Final = 4_096
FORWARDED_CHARS_MAX: Final = 1_024
# A registration costs a stranger nothing but a key, so the table of peers has an end.
PEERS_MAX: Final = 1_000_000
BOOTSTRAP_ADDRESSES_MAX: Final = 16
# Several sellers are worth more to a newcomer than several addresses of one.
BOOTSTRAP_ADDRESSES_PER_PEER: Final = 2
# Of each kind, by chance; with one network each, some dozens would do.
BOOTSTRAP_SELLERS_CONSIDERED: Final = 256
# Choosing among a million sellers takes a second of one reader's thread.
BOOTSTRAP_KEPT_S: Final = 30
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

# Enough for a session's whole story, unless its buyer claims rising vouchers on purpose.
ESCROW_EVENTS_SHOWN_MAX: Final = 100
ESCROWS_PAGE_MAX: Final = 100

# Each account/me answer lists a wallet for each.
CURRENCIES_MAX: Final = 16
# What is bonded is kept in the ledger for ever, so it must be worth its rows.
BOND_NANOS_MIN: Final = NANOS_PER_CREDIT // 1_000
# Each release is a timer; a peer that wants more back at once asks for more in one request.
BOND_RELEASES_PER_PEER_MAX: Final = 16
BOND_RELEASES_PER_ROUND_MAX: Final = 1_024
# A bond request can be repeated while it is valid; its nonce is kept a little longer than that.
BOND_REQUEST_LIFETIME_S: Final = 300
BOND_REQUEST_KEPT_S: Final = 3_600
BOND_RELEASE_S_MAX: Final = 90 * 24 * 3600

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
# Who does not take the 48 KiB of a full buffer in this time, or nothing of what is left of an
# answer, holds the connection on purpose: that is 2 kB/s. The kernel keeps some seconds more.
TAKEN_S_MAX: Final = 30.0
# A target, a token and some dozen fields; other servers take 8 to 64 KiB.
HEAD_BYTES_MAX: Final = 32_768
# Connections, idle ones included: each costs a socket and some kilobytes.
REQUESTS_CONCURRENT_MAX: Final = 1_024
# Of one address: a small farm of sellers behind it, each with a stream and a request. Sixteen such
# addresses are needed to take all places.
CONNECTIONS_PER_ADDRESS_MAX: Final = 64
# Places that no stranger gets: for a reverse proxy's own questions and whoever supervises us.
LOCAL_CONNECTIONS_KEPT: Final = 16
SHUTDOWN_S_MAX: Final = 5

# Repeats of an unsigned request get its stored answer for three days (the IETF draft asks for a
# stated time): longer than any client's own retries.
IDEMPOTENCY_KEPT_S: Final = 72 * 3600
# An answer is about 1 kB; the rate limits keep honest principals far below this.
IDEMPOTENCY_KEYS_PER_PRINCIPAL_MAX: Final = 10_000
IDEMPOTENCY_PRUNED_PER_ROUND_MAX: Final = 5_000

# An event names what changed and by how much; documents are fetched by their own routes.
EVENT_BODY_BYTES_MAX: Final = 8_192
# Two parties of a session, their owners, a checker and some replicas.
EVENT_PARTIES_MAX: Final = 32
EVENTS_PAGE_MAX: Final = 100
# What a live reader may lag behind before it is told to come back with its cursor: some 100 kB.
EVENTS_LAG_MAX: Final = 256
EVENTS_BATCH_MAX: Final = 512
# Webhooks are tried for three days: an event outlives its tries. And at most for some years.
EVENTS_KEPT_S_MIN: Final = 4 * 24 * 3600
EVENTS_KEPT_S_MAX: Final = 10 * 365 * 24 * 3600
EVENTS_KEPT_S_DEFAULT: Final = 90 * 24 * 3600
# One transaction's share, some milliseconds; and a round's: more than are made meanwhile.
EVENTS_PRUNED_AT_ONCE_MAX: Final = 1_000
EVENTS_PRUNED_PER_ROUND_MAX: Final = 100_000
# A stream costs a socket and up to EVENTS_LAG_MAX shared references; REQUESTS_CONCURRENT_MAX holds
# for all connections, so streams may take a quarter of them.
EVENT_STREAMS_MAX: Final = 256
EVENT_STREAMS_PER_PRINCIPAL_MAX: Final = 8
# A peer costs nothing: without this, those of one address could take all.
EVENT_STREAMS_PER_ADDRESS_MAX: Final = 32
# Proxies close what is silent for 30 s or more; credentials are checked again as often.
EVENTS_HEARTBEAT_S: Final = 15.0
# A stream ends after an hour and its reader resumes: no connection outlives its terms for long.
EVENTS_STREAM_S_MAX: Final = 3_600.0
# A frame that cannot be sent in this time has a reader that does not read.
EVENTS_SEND_S_MAX: Final = 10.0
# A client sends its token and nothing else.
WEBSOCKET_BYTES_MAX: Final = 4_096
# The first message of a WebSocket without an Authorization header.
EVENTS_HELLO_S_MAX: Final = 10.0
# A lost wake-up delays events by as much.
EVENTS_POLL_S: Final = 1.0

WEBHOOKS_PER_PRINCIPAL_MAX: Final = 16
WEBHOOKS_MAX: Final = 10_000
WEBHOOKS_CONCURRENT_MAX: Final = 16
# Of one owner; and of all endpoints whose last turn took long: slow ones leave places to the rest.
WEBHOOKS_CONCURRENT_PER_PRINCIPAL_MAX: Final = 2
WEBHOOKS_SLOW_CONCURRENT_MAX: Final = 8
WEBHOOK_SLOW_S: Final = 2.0
# No attempt begins later in a turn; its endpoint waits behind the others then.
WEBHOOK_TURN_S_MAX: Final = 5.0
# Names that are looked up at once, in threads of their own: strangers choose how long one takes.
WEBHOOK_LOOKUPS_MAX: Final = 8
# Deliveries of one endpoint before others get their turn.
WEBHOOK_TURN_MAX: Final = 32
WEBHOOK_ROUND_S: Final = 5.0
WEBHOOKS_DUE_PER_ROUND_MAX: Final = 256
# Name look-up, connecting, sending and the answer's head together.
WEBHOOK_ATTEMPT_S_MAX: Final = 10.0
# Longer than an attempt and the write after it, so a lease ends only with its process.
WEBHOOK_LEASE_S: Final = 60
WEBHOOK_RETRY_S_MIN: Final = 5
WEBHOOK_RETRY_S_MAX: Final = 6 * 3600
# An event that could not be delivered for three days is a dead letter and disables its endpoint.
WEBHOOK_GIVE_UP_S: Final = 3 * 24 * 3600
WEBHOOK_DELIVERIES_KEPT: Final = 100
WEBHOOK_ADDRESSES_MAX: Final = 16

# Cosignatures of a head that peers of their own accord may add; those of the settings come on top.
WITNESS_PLACES: Final = 8
# A head gets its cosignatures within a minute or never, so a receipt looks no further back.
COSIGNED_HEADS_COMPARED: Final = 16
# A witness far away answers in a second; no market waits for one that does not.
WITNESS_EXCHANGE_S: Final = 10.0
# The first answer may tell that the witness is at another size; the second is the real one.
WITNESS_ROUNDS_MAX: Final = 3
# A witness's clock may be wrong by as much.
COSIGNATURE_CLOCK_S: Final = 300

# A payout has rows that are never deleted, and a provider's price: a thousandth of a credit.
PAYOUT_NANOS_MIN: Final = NANOS_PER_CREDIT // 1_000
PAYOUT_REQUEST_LIFETIME_S: Final = 300
# Each is paid within seconds unless the provider is away; more wait in the account's own hands.
PAYOUTS_OPEN_PER_ACCOUNT_MAX: Final = 16
PAYOUTS_PER_ROUND_MAX: Final = 256
PAYOUTS_PAGE_MAX: Final = 100
PAYOUT_ROUND_S: Final = 15.0
# A provider that does not answer is asked again after 5 s, 10 s, ... and every hour in the end.
PAYOUT_RETRY_S_MIN: Final = 5
PAYOUT_RETRY_S_MAX: Final = 3_600
# One answer of a provider: slow ones are asked again, they must not stop the others.
PROVIDER_S_MAX: Final = 30.0
DEPOSITS_PAGE_MAX: Final = 256
# The rest follows in the next round, so one busy provider does not keep others waiting.
DEPOSIT_PAGES_PER_ROUND_MAX: Final = 16
# Both books are read twice; on a busy market they may move in between.
RECONCILE_ATTEMPTS_MAX: Final = 5
# A difference is looked at again every hour, so that what was only late heals by itself.
RECONCILE_RETRY_S: Final = 3_600

# An offer is 4 kB with its signed advert.
OFFERS_PAGE_MAX: Final = 100
# Who looks through more than these asks for something narrower. The last page costs most: 30 ms of
# 20,000 sellers.
OFFERS_DEPTH_MAX: Final = 400
# Each holds the index's lock; the other thread encodes its answer meanwhile.
OFFERS_SEARCHES_MAX: Final = 2
OFFERS_CURSOR_CHARS_MAX: Final = 200

# The overlay thread asks its process to end and then ends it: 4 s at the worst.
OVERLAY_SHUTDOWN_S_MAX: Final = 8.0
OVERLAY_CALL_S_MAX: Final = 20.0
OVERLAY_CALLS_MAX: Final = 4
# While nobody is connected, sellers that have just registered are looked for often.
OVERLAY_LONELY_S: Final = 2.0
OVERLAY_LOOK_S: Final = 60.0
# Enough for gossip to reach the coordinator when some leave.
OVERLAY_PEERS_WANTED: Final = 4
# A head of the log is shown to witnesses at most this often: 16 streams a minute.
WITNESS_EVERY_S: Final = 60.0
# What witnesses remember is asked for at a start, once the overlay has found them.
WITNESS_START_S_MAX: Final = 15.0
OVERLAY_RETRY_S_MIN: Final = 2.0
OVERLAY_RETRY_S_MAX: Final = 300.0

# What /metrics asks of the database is asked this often at most: anybody may fetch it.
METRICS_KEPT_S: Final = 5.0

# A party that is away for a month has lost: the other side's money waits as long.
DISPUTE_S_MAX: Final = 30 * 24 * 3600
# An opener's share of what is looked at in every round; each holds a bond of its own besides.
DISPUTES_OPEN_PER_PEER_MAX: Final = 16
# What a party ever opens about one agreement: each opening is kept for ever.
DISPUTES_PER_PARTY_MAX: Final = REFUNDED_ORDERS_MAX
# Each is opened and verified again, some milliseconds; the rest follows next round, and what could
# not go on comes after what waits longer.
DISPUTES_PER_ROUND_MAX: Final = 256
DISPUTE_RETRY_S: Final = 600
# Of what is owed from one bond so much is paid in one operation; releases wait for the rest.
LIENS_PER_ROUND_MAX: Final = 64
# A document of a dispute is up to a hundred signatures to verify: in so many threads, and of one
# peer so many a second. A party shows nine and takes one back.
DISPUTE_THREADS_MAX: Final = 2
DISPUTE_DOCUMENTS_RATE: Final = 1
DISPUTE_DOCUMENTS_BURST: Final = 64
# How often a document is prepared anew because another one came in between.
DISPUTE_TRIES_MAX: Final = 4
DISPUTES_PAGE_MAX: Final = 100
