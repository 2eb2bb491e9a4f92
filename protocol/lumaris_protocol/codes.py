"""Every stable code: errors, refusals, non-matches and end reasons. `docs/errors.md` lists them all.

Exit codes: 0 ok, 1 error, 2 usage, 3 job failed, 4 identity, 5 not found, 6 no offers, 7 budget,
8 time-out, 9 verification, 10 unreachable, 125 failure of ours in a foreground run, 130 interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """What a code means, what to do next, and the exit status it maps to."""

    meaning: str
    hint: str
    exit_code: int = 1


CODES: dict[str, Code] = {
    # --- documents from a stranger ---
    "malformed": Code("The bytes are not a document of this protocol.", "Check that both sides run the same version.", 9),
    "oversize": Code("The document or frame is larger than its limit.", "Split it; limits are listed in docs/protocol.md.", 9),
    "bad_signature": Code("The signature does not match the document.", "The document was altered or signed by another key.", 9),
    "wrong_domain": Code("The document was signed for another network or purpose.", "Check the network name on both sides.", 9),
    "wrong_type": Code("A document of another type was expected.", "Check that both sides run the same version.", 9),
    "wrong_signer": Code("The document is validly signed, but not by the party it must come from.", "Someone is passing on another party's document.", 9),
    "unknown_field": Code("The document has a field or value this version does not know.", "Update the older side.", 9),
    "expired": Code("The document is past its expiry.", "Ask for a fresh one; check both clocks.", 9),
    "not_yet_valid": Code("The document is dated in the future.", "Check both clocks.", 9),
    "replayed": Code("The document was seen before.", "Nothing to do: it was not applied twice.", 9),
    "out_of_sequence": Code("The document does not follow the last one of its signer.", "The session is closed; open a new one.", 9),
    "broken_chain": Code("The document does not name the hash of its predecessor.", "The session is closed; both copies are evidence.", 9),
    "not_certified": Code("The peer shows no valid membership certificate.", "Register with the coordinator first.", 4),
    "map_invalid": Code("The shard map does not give each region and class exactly one shard.", "Correct the coordinator's shard map; docs/settings.md describes it.", 2),
    "map_stale": Code("A newer shard map is known, or the same version says something else.", "Raise the version when the shard map changes.", 9),
    "directory_full": Code("The directory of sellers is full.", "Nothing to do: room is made as adverts expire.", 10),
    "truncated": Code("The stream ended inside a frame.", "Try again; the other side went away.", 10),
    "invalid_transition": Code("This side broke its own rules.", "This is a bug: please report it with the text above.", 1),
    # --- discovery and matching ---
    "no_offers": Code("No seller matches the requirements.", "Loosen a requirement; `lumaris offers --why` counts what each one excludes.", 6),
    "no_sellers": Code("No seller is known on this network yet.", "Wait a few seconds, or check that sellers are up: `lumaris offers`.", 6),
    "cpu_short": Code("Not enough free CPU.", "Ask for fewer cores.", 6),
    "memory_short": Code("Not enough free memory.", "Ask for less memory.", 6),
    "disk_short": Code("Not enough free disk.", "Ask for less disk.", 6),
    "gpu_short": Code("No matching free GPU.", "Ask for another model or none.", 6),
    "runtime_missing": Code("The seller does not offer the runtime.", "Use a runtime listed by `lumaris offers`.", 6),
    "image_missing": Code("The seller does not hold the image.", "Choose a seller that lists its digest, or a catalog image.", 6),
    "assurance_low": Code("The seller's isolation is below what was asked.", "Lower the assurance, or wait for another seller.", 6),
    "region_excluded": Code("The seller is in another region.", "Add its region.", 6),
    "price_high": Code("The seller's price is above the limit.", "Raise the price limit.", 6),
    "peer_excluded": Code("The seller was excluded by name or after a failure.", "Remove it from the excluded list.", 6),
    "withdrawn": Code("The seller has withdrawn its offer.", "Choose another seller.", 6),
    "duration_long": Code("The lease is longer than the seller accepts.", "Ask for a shorter lease.", 6),
    # --- negotiation ---
    "no_capacity": Code("The seller has no free capacity left.", "Other sellers were tried; try again in a moment.", 6),
    "too_many_holds": Code("Too many quotes are held for this buyer.", "Accept or let earlier quotes lapse.", 6),
    "not_accepting": Code("The seller is not taking new work.", "Another seller is tried automatically.", 6),
    "quote_unknown": Code("The quote is unknown or was already used.", "Ask for a new quote.", 6),
    "quote_expired": Code("The quote's hold ran out.", "Ask for a new quote.", 6),
    "terms_changed": Code("The agreement does not repeat the quote's terms.", "The agreement was refused; ask for a new quote.", 9),
    "grant_invalid": Code("The budget grant does not cover this agreement.", "Ask the coordinator for a grant for this agreement.", 7),
    "terms_refused": Code("The coordinator does not hold money under these terms.", "Read its fee and currency at /v1/info and negotiate again.", 7),
    # --- money ---
    "no_funds": Code("The account's free balance is below what the grant must hold.", "Deposit credit (`lumaris wallet deposit`), lower --max-cost, or settle open sessions.", 7),
    "budget_exceeded": Code("The spending cap does not cover this.", "Raise the cap: --max-cost.", 7),
    "claim_unproven": Code("The claimed total is not the one that the voucher or the co-signed end proves.", "Claim exactly what the highest voucher says.", 9),
    "over_cap": Code("The amount is above the grant's cap.", "The voucher was refused.", 9),
    "voucher_stale": Code("The voucher does not raise the amount.", "Present the highest voucher.", 9),
    "voucher_foreign": Code("The voucher belongs to another session.", "Present the voucher of this session.", 9),
    "overcharged": Code("The seller asked for more than the agreed price of the time used.", "The buyer stopped paying; vouchered money is the most that can be lost.", 9),
    "unpaid": Code("The unpaid amount reached the agreed exposure.", "The buyer must send a voucher; the job waits, then ends.", 7),
    "already_settled": Code("The session is settled; another amount cannot be claimed.", "Nothing to do: the first settlement stands.", 9),
    "already_granted": Code("The agreement already has a grant.", "Use the grant you hold.", 7),
    "credit_limit": Code("The test-credit limit of this account is reached.", "Ask the operator, or use a new devnet.", 7),
    "window_open": Code("The seller may still settle this session.", "The rest returns when the settle window ends.", 7),
    "declined": Code("You declined the plan; nothing was held or spent.", "", 1),
    # --- a job ---
    "succeeded": Code("The command exited with status 0 and its outputs were delivered.", "", 0),
    "exit_nonzero": Code("The command exited with a non-zero status.", "Read the log: `lumaris job logs`.", 3),
    "killed_deadline": Code("The job ran past its time limit and was killed.", "Raise --timeout.", 8),
    "killed_memory": Code("The job went over its memory limit and was killed.", "Raise --memory.", 3),
    "killed_pids": Code("The job started too many processes and was killed.", "Start fewer processes.", 3),
    "killed_disk": Code("The job went over its disk limit and was killed.", "Raise --disk.", 3),
    "killed_output": Code("The job's output files break the limits.", "Write fewer or smaller plain files.", 3),
    "killed_log": Code("The job printed more than its log limit and was killed.", "Print less, or write to a file.", 3),
    "killed_fuel": Code("The job used up its instruction budget and was killed.", "Raise `fuel` in the JobRequest.", 3),
    "killed_trap": Code("The WebAssembly guest trapped.", "Read the log; the module itself is at fault.", 3),
    "killed_owner": Code("The seller's owner stopped the job.", "The job is run elsewhere if the retry policy allows.", 3),
    "cancelled": Code("The buyer cancelled the job.", "", 130),
    "platform_error": Code("The seller's machine failed the job.", "It is run elsewhere if the retry policy allows.", 125),
    "bad_image": Code("The image is not known, or is not what its digest says.", "Use a catalog name, a .wasm file, or sha256:<digest> of a container image that a seller holds.", 125),
    "bad_command": Code("The command cannot be started in this image.", "Check the command and its path inside the image.", 125),
    "bad_input": Code("An input is missing, unreadable, too large or has an unsafe name.", "Check the paths given with --in.", 2),
    "tier_unavailable": Code("The runtime is not available on this machine right now.", "Another seller is tried automatically.", 125),
    "prepare_timeout": Code("Preparing the job took too long.", "Try again, or use fewer inputs.", 8),
    "output_mismatch": Code("A delivered output does not match its hash.", "It was rejected and not paid.", 9),
    "rejected": Code("The buyer rejected the delivery.", "", 9),
    "seller_lost": Code("The seller went away before delivering.", "Unvouchered work costs nothing; it is run elsewhere if the retry policy allows.", 10),
    "buyer_lost": Code("The buyer went away.", "The seller keeps what was vouchered.", 10),
    "queue_full": Code("Too many orders wait in this session.", "Wait for results before sending more.", 1),
    "lease_ended": Code("The lease is over.", "Open a new session.", 8),
    "shutting_down": Code("The seller is shutting down.", "Another seller is tried automatically.", 10),
    "idle": Code("The session had no orders for a while.", "A new session is opened when needed.", 0),
    "closed": Code("The session was closed by agreement.", "", 0),
    # --- programs ---
    "dial_back_refused": Code("The peer does not dial us back.", "Nothing to do: another peer is asked, or this one later.", 10),
    "unreachable": Code("The other side cannot be reached.", "Check that it runs and that the address is right.", 10),
    "coordinator_unreachable": Code("The coordinator cannot be reached.", "Check its address (LUMARIS_COORDINATOR_URL) and that it is up. Open sessions are not affected.", 10),
    "overlay_failed": Code("The overlay process did not start or went away.", "Read its log in the state directory; install the p2p extra if it is missing.", 10),
    "port_in_use": Code("The port is already in use.", "Choose another with --port or --listen, or stop the program that uses it.", 1),
    "not_writable": Code("The directory cannot be written.", "Choose another with --state, or fix its permissions.", 1),
    "already_running": Code("It is already running.", "Stop it first, or use another state directory.", 1),
    "not_running": Code("It is not running.", "Start it first.", 5),
    "not_found": Code("There is no such thing here.", "List what exists with the `ls` command.", 5),
    "usage": Code("The arguments do not fit the command.", "See --help.", 2),
    "missing_extra": Code("An optional part of Lumaris is not installed.", "Install it: pip install 'lumaris[all]'.", 1),
    "config_invalid": Code("The configuration is not valid.", "Fix the named setting.", 2),
    "unsafe_key_file": Code("The key file can be read by other users.", "chmod 600 it.", 4),
    "unauthorized": Code("The request carries no valid credentials.", "Register again.", 4),
    "forbidden": Code("These credentials do not allow that.", "Use the account that owns it.", 4),
    "idempotency_mismatch": Code("The same key was used with another request.", "Use a fresh key.", 1),
    "busy": Code("The coordinator's queue is full.", "Try again after the stated time.", 10),
    "job_failed": Code("One or more jobs failed.", "See `lumaris job ls`.", 3),
    "timeout": Code("It took longer than allowed.", "Raise --timeout.", 8),
    "receipt_invalid": Code("The receipt does not verify.", "Do not rely on it; ask the coordinator for the original.", 9),
    "interrupted": Code("Interrupted.", "Work in hand was cancelled and cleaned up.", 130),
    "internal": Code("Something failed inside.", "This is a bug: please report it with the log.", 1),
}  # fmt: skip
