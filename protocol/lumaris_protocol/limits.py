"""The bounds of the protocol: what both sides of a message must agree on.

Sizes are bytes, times are seconds, money is nanos. A bound of one program alone (a
cache, a pool, a retry) stands beside the code that it bounds.
"""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# --- documents -------------------------------------------------------------------------------
# An advert is gossiped to every buyer of a shard: 2 kB at 12 adverts/s is 24 kB/s per node.
ADVERT_BYTES_MAX = 2 * KIB
# Any other signed document. The largest is a receipt bundle's agreement with two signatures.
ENVELOPE_BYTES_MAX = 64 * KIB
# An agreement with the longest lists of GPUs and of hosts is 13 kB. Both its copies, the grant, a
# voucher and both closes must fit one claim, in base64: 54 KiB at their largest.
AGREEMENT_BYTES_MAX = 16 * KIB
# What a session says of money: with the longest reason 1 kB.
MONEY_BYTES_MAX = 2 * KIB
# One frame on a stream: an envelope or a chunk of log or file with its header.
FRAME_BYTES_MAX = 256 * KIB
# Bytes of guest output in one LogChunk; base64 and the envelope around it stay under a frame.
LOG_CHUNK_BYTES_MAX = 32 * KIB
# A piece of a file on the blob stream. Large writes amortise the per-frame cost of the muxer.
BLOB_CHUNK_BYTES_MAX = 192 * KIB
# What a file is asked for, checked and resumed by. A list of the hashes of all beginnings of the
# largest file, 32 bytes for each chunk, fits one frame.
CHUNK_BYTES = 1 * MIB
# Files a program moves at once, each with a thread and a few chunks in memory.
BULK_TRANSFERS_MAX = 64
BULK_SOURCES_MAX = 8

# --- text fields -------------------------------------------------------------------------------
NAME_CHARS_MAX = 64
REASON_CHARS_MAX = 512
ADDRESS_CHARS_MAX = 256
ADDRESSES_MAX = 8
PATH_CHARS_MAX = 255
PATH_DEPTH_MAX = 16
ARGUMENT_CHARS_MAX = 32 * KIB
ARGUMENTS_MAX = 256
ENVIRONMENT_MAX = 64
RUNTIMES_MAX = 8
FEATURES_MAX = 8
EGRESS_RULES_MAX = 16
IMAGE_SOURCE_CHARS_MAX = 384
GPUS_MAX = 16
BENCHMARKS_MAX = 8
CACHED_DIGESTS_MAX = 8
EXCLUDED_PEERS_MAX = 64
REGIONS_MAX = 16

# --- time ------------------------------------------------------------------------------------
CLOCK_SKEW_S = 60
ADVERT_LIFETIME_S_MAX = 900
ADVERT_REFRESH_S = 300
# A record in the DHT outlives three missed refreshes of half an hour.
ENDPOINT_LIFETIME_S_MAX = 2 * 3600
CERTIFICATE_LIFETIME_S_MAX = 72 * 3600
SESSION_KEY_LIFETIME_S_MAX = (
    24 * 3600
)  # an agreement delegates to session keys, so it ends within this
QUOTE_HOLD_S_MAX = 10  # held capacity costs the seller other buyers
REPLY_BY_S_MAX = 30
CHALLENGE_LIFETIME_S = 300
SETTLE_WINDOW_S_DEFAULT = 30 * 24 * 3600
SETTLE_WINDOW_S_MAX = 400 * 24 * 3600

# --- notices of a coordinator --------------------------------------------------------------------
# A notice is gossiped to everybody; at its largest it is 64 revocations of 200 bytes.
NOTICE_BYTES_MAX = 24 * KIB
REVOCATIONS_PER_NOTICE_MAX = 64
# One rotation a month, with keys kept for twice the longest settle window.
SIGNING_KEYS_MAX = 32
# What a peer keeps and tells newcomers: the newest of each type, and revocations that still matter.
NOTICES_KEPT_MAX = 64
# Revocations matter for as long as a certificate lives: a crowd of this many needs 5 MB.
REVOCATIONS_REMEMBERED_MAX = 20_000
# How often nodes ask for revocations that gossip did not bring, and pages of them at a time.
REVOCATIONS_CHECK_S = 240
REVOCATION_PAGES_MAX = 64
# A newcomer asks a few peers; a coordinator speaks a few times a minute.
NOTICE_ASKS_PER_S_PER_PEER = 0.2
NOTICE_ASKS_BURST_PER_PEER = 10
# A request for a TLS certificate with the largest key accepted, RSA of 4,096 bits, is 1.7 kB.
CSR_BYTES_MAX = 4 * KIB
# What a coordinator answers with: a certificate of 0.7 kB, and room for a chain.
TLS_CERTIFICATE_BYTES_MAX = 16 * KIB

# --- disputes ------------------------------------------------------------------------------------
# A work order, delivery or event with the longest lists of files.
SESSION_DOCUMENT_BYTES_MAX = 4 * ENVELOPE_BYTES_MAX - KIB
# One opening or evidence bundle: the largest session document in base64, its agreement and a few
# more. It arrives in one request.
DISPUTE_DOCUMENT_BYTES_MAX = 8 * ENVELOPE_BYTES_MAX
# What such a message is beyond its documents in base64: 1 kB with 64 of them. More would be blanks
# that nobody counts, of which a dispute file had no room for the other side's evidence.
DISPUTE_FRAME_BYTES_MAX = 4 * KIB
# Each side has half of what a dispute may hold, so that neither can use up the other's room.
EVIDENCE_BYTES_MAX = 1 * MIB
# Each is a signature to verify, again whenever the dispute goes on: 128 are 10 ms.
EVIDENCE_DOCUMENTS_MAX = 64
EVIDENCE_BUNDLES_MAX = 8
# A silent checker is replaced this often; with the default times a check then takes three days.
CHECKERS_MAX = 3
# A buyer opens no more disputes about one agreement, so no more of its orders are refunded.
REFUNDED_ORDERS_MAX = 16
# 256 candidates are 25 kB: one envelope. The sellers with the largest bonds are taken.
CHECKER_CANDIDATES_MAX = 256
# Sessions with drawn checkers that one side shows: each checker, and tries that came to nothing.
OTHER_SESSIONS_MAX = 2 * CHECKERS_MAX
# The opener's bond: at 12 % of what is asked a false dispute does not pay while fewer than one
# checker in ten lies. The least of it pays for keeping the dispute for ever.
DISPUTE_BOND_BPS = 1_200
DISPUTE_BOND_NANOS_MIN = 1_000_000
# What the loser owes beyond the amount itself: a tenth for what was not delivered or not paid, as
# much again for a wrong result (a tenth of a bond of ten prices).
PENALTY_BPS = 1_000
PENALTY_WRONG_BPS = 10_000
# A bond counts in the draw of a checker up to this, so that no one seller is drawn every time.
CHECKER_WEIGHT_NANOS_MAX = 100_000_000_000
# An order may run this much over its wall limit before its delivery is late: the kill takes time.
LATE_BPS = 11_000
# A dispute file: two sides' evidence in base64 twice is 1.9 MiB, three draws with their lists and a
# ruling at their largest 0.9 MiB.
DISPUTE_FILE_BYTES_MAX = 4 * MIB

# --- the receipts log ----------------------------------------------------------------------------
# A checkpoint with sixteen cosignatures, at 220 characters each, is 4 kB.
CHECKPOINT_CHARS_MAX = 8 * KIB
NOTE_SIGNATURES_MAX = 32
WITNESSES_MAX = 16
CONSISTENCY_HASHES_MAX = 63  # the most that a witness is sent (C2SP tlog-witness)
WITNESS_CHARS_MAX = 12 * KIB  # a checkpoint after as many hashes in base64

# --- one job ------------------------------------------------------------------------------------
INPUT_FILES_MAX = 1_000
INPUT_BYTES_MAX = 4 * GIB
OUTPUT_FILES_MAX = 1_000  # the manifest must fit one envelope-sized frame's worth of work to check
OUTPUT_BYTES_MAX = 4 * GIB
FILE_BYTES_MAX = 1 * GIB
# Inputs lie on the seller's disk unpaid and beside what the agreement sells: room for a few models
# or data sets, and small enough that every session of a node may have it.
INPUT_ALLOWANCE_BYTES = 256 * MIB
LOG_BYTES_MAX = 8 * MIB
MEMORY_BYTES_MAX = 4 * 1024 * GIB
WALL_S_MAX = 24 * 3600
PREPARE_S_MAX = 600
FUEL_MAX = 1 << 62
ORDERS_QUEUED_MAX = 64  # per session: enough to hide a round trip, small enough to bound memory
# A cancelled guest has this long to end by itself at most; the wall clock goes on meanwhile.
GRACE_S_MAX = 30
GRACE_S_DEFAULT = 2
# Processes and threads of one job. CPython with threads and subprocesses runs well within these.
PIDS_DEFAULT = 256
PIDS_MAX = 4096
OPEN_FILES_MAX = 1024
# How long a frozen order waits for a voucher before its session ends.
PAY_WAIT_S = 30
# A seller with orders in hand says something this often; a buyer gives up after several misses.
KEEPALIVE_S = 5
SILENCE_S = 30
# A session without orders gives its capacity back after this long.
IDLE_S_MAX = 60
MODULE_BYTES_MAX = 256 * MIB  # a wasm image; CPython is 26 MB, CPython with numpy about 100 MB
# An image is fetched or compiled within this; it has nothing to do with the time of the job.
IMAGE_S_MAX = 1800
IMAGE_BYTES_MAX = 16 * GIB
LAYERS_MAX = 128  # of a container image; engines stop at 127
SCRATCH_FILES_MAX = 65_536  # files a job may have in /out at once; each costs the seller an inode

# --- one seller ----------------------------------------------------------------------------------
QUOTES_HELD_MAX = 64
QUOTES_HELD_PER_BUYER_MAX = 4
SESSIONS_MAX = 256

# Work that a peer may ask for to see a seller's claim proven: seconds, not minutes.
CHALLENGE_PARALLEL_MAX = 256
CHALLENGE_ROUNDS_MAX = 1 << 32
CHALLENGE_MEMORY_BYTES_MAX = 4 * GIB
CHALLENGE_FILLS_MAX = 16  # each is a process that keeps a core busy for a second a GiB
CHALLENGE_STATES_MAX = 65

# --- money -------------------------------------------------------------------------------------
# 2**53 - 1 nanos is 9,007,199 credits: exact in every JSON reader, far above any session's cap.
NANOS_MAX = (1 << 53) - 1
FEE_BPS_MAX = 10_000
# Of one agreement: a session lives a day at most, and a receipt file carries each of them twice.
AMENDMENTS_MAX = 32
# Of one agreement's escrow: its receipt file carries the rulings that paid from it.
DISPUTES_PER_ESCROW_MAX = 16
VOUCHER_INTERVAL_S_MIN = 1
VOUCHER_INTERVAL_S_MAX = 60
SEQ_MAX = (1 << 53) - 1

# --- the overlay -----------------------------------------------------------------------------
# Five shards' worth of sellers at 2 kB each: 40 MB in the overlay process.
DIRECTORY_ADVERTS_MAX = 20_000
# One page answers a late joiner of a shard of 2,000 sellers in one round trip: at most 4 MB.
INDEX_PAGE_ADVERTS_MAX = 2_000
INDEX_PAGES_MAX = 10
INDEX_PEERS_MAX = 3
# A seller's free capacity may jump several times a second; above that its adverts are dropped.
ADVERTS_PER_S_PER_SELLER = 2
ADVERTS_BURST_PER_SELLER = 10
# A peer that keeps passing on documents no honest peer would is disconnected.
BAD_ADVERTS_PER_S_PER_PEER = 1
BAD_ADVERTS_BURST_PER_PEER = 20
# A page of the index costs us up to 4 MB; an honest newcomer asks for at most ten.
INDEX_ASKS_PER_S_PER_PEER = 1
INDEX_ASKS_BURST_PER_PEER = 20
# A peer sent away for its faults is refused this long.
BAN_S = 60
# A peer without a certificate has this long to show one, and so many are waited for at a time.
STRANGER_S = 10
STRANGERS_MAX = 16
# Inbound connections whose handshake is not done: an honest one takes milliseconds.
HANDSHAKES_MAX = 64
# Handshakes that end with a stranger or not at all, by IP (IPv6: by /64), and of all such IPs
# together: 10 ms of CPU each. An IP from which a member is connected may have so many times more.
NEWCOMERS_PER_S_PER_IP = 1
NEWCOMERS_BURST_PER_IP = 10
NEWCOMERS_MEMBER_FACTOR = 5
# By site: an IPv4 /24 or an IPv6 /48, of which one owner has many of the above.
NEWCOMERS_PER_S_PER_SITE = 5
NEWCOMERS_BURST_PER_SITE = 50
NEWCOMERS_PER_S = 30
NEWCOMERS_BURST = 200
# Of these, kept for networks not seen in the last minute (by IPv4 /16 or IPv6 /32).
NEWCOMERS_RESERVED_PER_S = 10
NEWCOMERS_RESERVED_BURST = 50
# A member's own count only when it comes again and again.
RETURNS_PER_S_PER_PEER = 1
RETURNS_BURST_PER_PEER = 20
# Streams that one peer opens on the overlay: 2 ms of CPU each, and programs talk over links.
STREAMS_PER_S_PER_PEER = 100
STREAMS_BURST_PER_PEER = 150
# A hello costs a signature check and a few hundred bytes.
HELLOS_PER_S_PER_PEER = 2
HELLOS_BURST_PER_PEER = 20
# What one peer may make us do for gossip: an honest one forwards the shard's 12 adverts/s.
GOSSIP_COST_PER_S_PER_PEER = 100
GOSSIP_COST_BURST_PER_PEER = 500
# A demand costs every seller of a shard a look; a buyer has one open at a time, and few at most.
DEMAND_BYTES_MAX = 4 * KIB
DEMAND_LIFETIME_S_MAX = 30
DEMAND_ADDRESSES_MAX = 4  # circuits, and direct ones on one IP; a seller dials two
DEMANDS_PER_S_PER_BUYER = 0.2
DEMANDS_BURST_PER_BUYER = 5
TENDERS_MAX = 16  # answers to one demand
OVERLAY_CONNECTIONS_MAX = 300
# An index peer of every shard of a large market names itself under its busiest ones.
ENDPOINT_SHARDS_MAX = 16
# The DHT: one record, and how many index peers of a shard are kept under its key.
DHT_RECORD_BYTES_MAX = 3 * KIB
DHT_INDEX_PEERS_MAX = 16
# The overlay process holds about 100 MB when idle, and its full directory is 40 MB more.
OVERLAY_MEMORY_BYTES = 512 * MIB
PEERS_REMEMBERED_MAX = 256
# The shard map travels in one header of the overlay's socket, in base64.
SHARD_MAP_BYTES_MAX = 8 * KIB
SHARD_MAP_LIFETIME_S_MAX = 7 * 24 * 3600
# 64 shards of 3,600 sellers are 230,000 sellers; ids leave room to retire old ones.
SHARDS_MAX = 64
# How often programs ask for the map: a new one is known to all well within the time that sellers
# are found by either.
SHARD_MAP_CHECK_S = 240
SHARD_ID_MAX = 4_095
SHARD_REGIONS_MAX = 32
# Each shard costs a follower its gossip: 12 adverts/s at 4.4 ms of CPU. Others are asked for.
SHARDS_FOLLOWED_MAX = 4
# The overlay's Unix socket: a header holds one notice in base64 at most.
SOCKET_HEADER_BYTES_MAX = 34 * KIB
SOCKET_STREAMS_WAITING_MAX = 256
SOCKET_CLAIM_S = 5

# --- reach and relays --------------------------------------------------------------------------
# Ports that a peer may be asked to dial us back at, and how often one peer may ask.
REACH_PORTS_MAX = 4
REACH_ASKS_PER_S_PER_PEER = 0.1
REACH_ASKS_BURST_PER_PEER = 4
# A message of the circuit or hole punching protocols; the latter's specification says 4 KiB.
RELAY_MESSAGE_BYTES_MAX = 4 * KIB
# Circuits that others opened to us, over all relays; one relay may open its share of them.
CIRCUITS_IN_MAX = 64
# What a relay gives away: one reservation costs it a table entry, a circuit two streams.
RELAY_RESERVATIONS_MAX = 500
RELAY_RESERVATIONS_PER_IP_MAX = 64
RELAY_RESERVATION_S = 3600
RELAY_CIRCUITS_MAX = 500
RELAY_CIRCUITS_PER_PEER_MAX = 32
# Of these, begun by one member; and to the same target, one and the next while the first ends.
RELAY_CIRCUITS_PER_SOURCE_MAX = 16
RELAY_CIRCUITS_PER_PAIR_MAX = 2
# Control traffic of a day of sessions, or one small transfer; bulk data belongs on a direct path.
RELAY_CIRCUIT_BYTES_MAX = 64 * MIB
RELAY_CIRCUIT_S_MAX = 3600
# How many relays a peer that nobody can dial asks to hold its place.
RELAYS_WANTED = 2
# Addresses that one side of a hole punch dials, and how many punches run at once.
PUNCH_ADDRESSES_MAX = 4
PUNCHES_AT_ONCE_MAX = 16

# --- links between programs ------------------------------------------------------------------
# One frame of a lane: small enough that other lanes get their turn between two.
LINK_FRAME_BYTES_MAX = 64 * KIB
# What a lane's reader lets its writer send ahead, at first and when it keeps up.
LINK_WINDOW_BYTES = 256 * KIB
LINK_WINDOW_BYTES_MAX = 1 * MIB
LINK_LANES_MAX = 256
LINK_PROTOCOLS_MAX = 32
# Frames of a link kept until the peer says that they arrived: 20 MB/s at 100 ms.
LINK_UNACKED_BYTES_MAX = 2 * MIB
# With lanes open, a silent peer is asked after this long, and the connection given up after that.
LINK_PING_S = 1.5
LINK_DEAD_S = 4.0
# A link without a connection is kept until its peer was not heard of for this long: time for an
# overlay process to come back, and less than the 10 s after which work must run elsewhere.
LINK_RESUME_S = 9.0
LINK_IDLE_S = 60.0
# Begun by others; as many again may be ours. All their unacknowledged frames: 512 MiB at worst.
LINKS_MAX = 256
# The programs of one key share its overlay: a few commands at a time.
LINKS_PER_PEER_MAX = 16
# What all lanes together may leave unread before the link with most of it is ended.
LINKS_UNREAD_BYTES_MAX = 256 * MIB

# An Idempotency-Key: a UUID has 36 characters.
IDEMPOTENCY_KEY_CHARS_MAX = 255
WEBHOOK_URL_CHARS_MAX = 2_048
