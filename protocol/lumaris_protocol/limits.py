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
# One frame on a stream: an envelope or a chunk of log or file with its header.
FRAME_BYTES_MAX = 256 * KIB
# Bytes of guest output in one LogChunk; base64 and the envelope around it stay under a frame.
LOG_CHUNK_BYTES_MAX = 32 * KIB
# A piece of a file on the blob stream. Large writes amortise the per-frame cost of the muxer.
BLOB_CHUNK_BYTES_MAX = 192 * KIB

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
GPUS_MAX = 16
BENCHMARKS_MAX = 8
CACHED_DIGESTS_MAX = 8
EXCLUDED_PEERS_MAX = 64
REGIONS_MAX = 16

# --- time ------------------------------------------------------------------------------------
CLOCK_SKEW_S = 60
ADVERT_LIFETIME_S_MAX = 900
ADVERT_REFRESH_S = 300
CERTIFICATE_LIFETIME_S_MAX = 72 * 3600
SESSION_KEY_LIFETIME_S_MAX = (
    24 * 3600
)  # an agreement delegates to session keys, so it ends within this
QUOTE_HOLD_S_MAX = 10  # held capacity costs the seller other buyers
REPLY_BY_S_MAX = 30
CHALLENGE_LIFETIME_S = 300
SETTLE_WINDOW_S_DEFAULT = 30 * 24 * 3600
SETTLE_WINDOW_S_MAX = 400 * 24 * 3600

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
GRACE_S = 2
# How long a frozen order waits for a voucher before its session ends.
PAY_WAIT_S = 30
# A seller with orders in hand says something this often; a buyer gives up after several misses.
KEEPALIVE_S = 5
SILENCE_S = 30
# A session without orders gives its capacity back after this long.
IDLE_S_MAX = 60
MODULE_BYTES_MAX = 256 * MIB  # a wasm image; CPython is 26 MB, CPython with numpy about 100 MB
SCRATCH_FILES_MAX = 65_536  # files a job may have in /out at once; each costs the seller an inode

# --- one seller ----------------------------------------------------------------------------------
QUOTES_HELD_MAX = 64
QUOTES_HELD_PER_BUYER_MAX = 4
SESSIONS_MAX = 256

# --- money -------------------------------------------------------------------------------------
# 2**53 - 1 nanos is 9,007,199 credits: exact in every JSON reader, far above any session's cap.
NANOS_MAX = (1 << 53) - 1
FEE_BPS_MAX = 10_000
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
OVERLAY_CONNECTIONS_MAX = 300
PEERS_REMEMBERED_MAX = 256
# The overlay's Unix socket: a header holds one advert in base64 and a few addresses.
SOCKET_HEADER_BYTES_MAX = 16 * KIB
SOCKET_STREAMS_WAITING_MAX = 256
SOCKET_CLAIM_S = 5
