"""Running a disputed order again on the seller that was drawn to check it, and on nobody else.

What counts is that the order is the same: image, command, environment, inputs by hash and limits.
The checker's signed answer is filed whatever it says. A run that was made and not filed, because
somebody pressed Ctrl-C in between, is found in our records and not bought again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from lumaris import artifacts, images
from lumaris.artifacts import hash_file
from lumaris.buyer import RETRY_S, Buyer, new_job
from lumaris.disputes import DisputeDesk
from lumaris.images import Image
from lumaris.jobs import JobRequest, Observer, ignore
from lumaris.pool import Approve
from lumaris.session import Session
from lumaris_protocol import agreements, codec, dispute_file, pleading
from lumaris_protocol.agreements import Contract
from lumaris_protocol.coordinator_api import Dispute, DisputeDetail
from lumaris_protocol.dispute_file import DisputeFile
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import OUTPUT_FILES_MAX
from lumaris_protocol.messages.dispute import CheckerDraw
from lumaris_protocol.messages.execution import WorkOrder
from lumaris_protocol.rulings import Dossier, work

# How long the drawn seller's offer, or room at it, is waited for; what says to go on waiting.
_OFFER_S: Final = 20.0
_PASSING: Final = frozenset(
    ("unreachable", "no_offers", "no_capacity", "too_many_holds", "quote_expired")
)
_CLAIM: Final = "wrong_result"


@dataclass(frozen=True)
class Check:
    """What is to be run again, where, and until when."""

    dispute: DisputeDetail
    checkers: tuple[str, ...]  # all that were drawn; the last one's turn it is
    check_by: int
    order: WorkOrder
    contract: Contract

    @property
    def checker(self) -> str:
        """The one that is asked."""
        return self.checkers[-1]


@dataclass(frozen=True)
class Checked:
    """What became of it: the dispute after filing, and the run."""

    dispute: Dispute
    session: str
    ran_before: bool


async def due(desk: DisputeDesk, dispute: str) -> Check:
    """The check that a dispute of ours waits for.

    Raises LumarisError `not_disputable` when there is none to make, `dispute_closed` after its end.
    """
    found = await desk.show(dispute)
    if found.claim != _CLAIM:
        raise LumarisError("not_disputable", f"Nothing is run again for {found.claim}.")
    file = dispute_file.decode(await desk.file(dispute))
    order, contract = desk.disputed_order(file, dispute)
    if found.ended_at is not None:
        raise LumarisError("dispute_closed")
    checkers = _drawn(file, contract, dispute)
    if not checkers or found.check_until is None:
        raise LumarisError(
            "not_disputable",
            "No checker is drawn yet.",
            hint="One is drawn once the list of those that may check stands in a signed head of the"
            " log: try again in a minute or two. With nobody on it nothing is decided.",
        )
    if contract.agreement.verification == "repl":
        checkers = await _next_replica(desk, file, checkers)
    return Check(found, checkers, found.check_until, order, contract)


async def _next_replica(
    desk: DisputeDesk, file: DisputeFile, drawn: tuple[str, ...]
) -> tuple[str, ...]:
    """The first drawn replica whose answer is not filed yet: each of them counts.

    Raises LumarisError `not_disputable` when all are.
    """
    shown = pleading.shown_by(file, desk.key.peer_id).documents
    for checker in drawn:
        sessions = [await desk.papers(session) for session in await desk.sessions_with(checker)]
        if not any(papers.by_buyer in shown for papers in sessions):
            return (checker,)
    raise LumarisError("not_disputable", "The answers of all drawn replicas are filed.")


def _drawn(file: DisputeFile, contract: Contract, dispute: str) -> tuple[str, ...]:
    """The checkers by the coordinator's signed draws, first to last. Raises LumarisError."""
    found = []
    for entry in file.draws:
        signer = contract.agreement.coordinator
        draw = codec.open_signed(entry.draw, CheckerDraw, network=file.network, signer=signer)
        if draw.message.dispute != dispute:
            raise LumarisError("dispute_invalid", "A draw is another dispute's.")
        found.append(str(draw.message.checker))
    return tuple(found)


async def run(
    buyer: Buyer,
    desk: DisputeDesk,
    check: Check,
    *,
    sources: Sequence[Path] = (),
    image: str = "",
    max_cost_nanos: int,
    approve: Approve | None = None,
    observe: Observer = ignore,
) -> Checked:
    """Have the drawn checker run the order, and file what it signed.

    `sources` are local files with the order's inputs, found by their content; `image` is the local
    module when the image is none of the catalog's. `approve` sees the plan before money is held.
    Raises LumarisError; what was vouchered to the checker by then is paid, and nothing is filed.
    """
    session = await _made(desk, check)
    ran_before = session is not None
    if session is None:
        _check_time(check)
        request, resolved = await _request(
            check, sources=sources, image=image, max_cost_nanos=max_cost_nanos
        )
        session = await _order(buyer, check, request, resolved, approve, observe)
    documents = await _answer(desk, check, session)
    paid = (await desk.papers(session)).total_nanos > 0
    if documents is None:
        raise LumarisError(
            "seller_lost",
            "The checker did not deliver a result.",
            hint="Check again; if it stays away, another one is drawn after the check's time.",
            money_moved=paid,
        )
    try:
        found, _ = await desk.add_evidence(check.dispute.dispute, documents=documents)
    except LumarisError as error:
        raise LumarisError(
            error.code,
            f"The checker ran the order, and its answer is not filed: {error.message}",
            hint="Check again: what was run is filed without buying another.",
            money_moved=paid and not ran_before,
        ) from None
    return Checked(found, session, ran_before)


def _check_time(check: Check) -> None:
    """Nothing is bought of a checker whose time is over. Raises LumarisError."""
    if time.time() > check.check_by:
        raise LumarisError(
            "not_disputable",
            "The drawn checker's time is over.",
            hint="Another one is drawn within two minutes, three at most: check again then.",
        )


async def _request(
    check: Check, *, sources: Sequence[Path], image: str, max_cost_nanos: int
) -> tuple[JobRequest, Image]:
    """The very same order as a request, with its files at hand. Raises LumarisError."""
    order, agreement = check.order, check.contract.agreement
    limits = order.limits
    if limits.output_files != OUTPUT_FILES_MAX:
        raise LumarisError("not_supported", "The order has limits that cannot be asked for here.")
    resolved = Image(agreement.tier, order.image, source=order.image_source)
    if image:
        given = await images.resolve(image, order.command, tier=agreement.tier)
        if given.digest != order.image:
            raise LumarisError("bad_image", f"{image} is not the image that was ordered.")
        resolved = given
    request = JobRequest(
        image=order.image,
        command=order.command,
        inputs=await _inputs(order, sources),
        environment=order.environment,
        cpu_millis=agreement.resources.cpu_millis,
        memory_bytes=limits.memory_bytes,
        disk_bytes=limits.disk_bytes,
        wall_s=limits.wall_s,
        fuel=limits.fuel,
        log_bytes=limits.log_bytes,
        max_cost_nanos=max_cost_nanos,
        pids=limits.pids,
        gpus=agreement.resources.gpus,
        attempts=1,
        tier=agreement.tier,
    )
    return request, resolved


async def _inputs(order: WorkOrder, sources: Sequence[Path]) -> Mapping[str, Path]:
    """The order's inputs among local files, by content. Raises LumarisError `bad_input`."""
    held: dict[str, Path] = {}
    for source in sources:
        _, sha256 = await trio.to_thread.run_sync(hash_file, source)
        held[sha256] = source
    missing = [file.path for file in order.inputs if file.sha256 not in held]
    if missing:
        raise LumarisError(
            "bad_input",
            f"{len(missing)} of {len(order.inputs)} inputs of the order are not given:"
            f" {', '.join(missing[:8])}.",
            hint="Give the files that were sent then, unchanged, each with --input.",
        )
    return {file.path: held[file.sha256] for file in order.inputs}


async def _order(
    buyer: Buyer,
    check: Check,
    request: JobRequest,
    image: Image,
    approve: Approve | None,
    observe: Observer,
) -> str:
    """Buy one session of the checker and run the order in it; the session's id."""
    inputs = await artifacts.describe_inputs(request.inputs)
    session = await _hired(buyer, check, request, image, approve)
    try:
        await buyer.order(session, request, image, inputs, observe, job=new_job(), attempt=1)
    finally:
        # The end writes down what both signed, and pays it.
        with trio.CancelScope(shield=True):
            await buyer.pool.close(session)
    return session.session


async def _hired(
    buyer: Buyer, check: Check, request: JobRequest, image: Image, approve: Approve | None
) -> Session:
    """A session with the drawn checker, that may be busy or unheard of for a while."""
    needs = buyer.pool.needs(request, image)
    give_up_at = trio.current_time() + _OFFER_S
    while True:
        try:
            return await buyer.pool.buy_from(
                check.checker, needs, cap_nanos=request.max_cost_nanos, approve=approve
            )
        except LumarisError as error:
            if error.code not in _PASSING:
                raise
            if trio.current_time() > give_up_at:
                raise LumarisError(
                    error.code,
                    f"The drawn checker cannot be asked now: {error.message}",
                    hint="Try again later. When its time is over, another one is drawn.",
                ) from None
        await buyer.market.change(RETRY_S)


async def _made(desk: DisputeDesk, check: Check) -> str | None:
    """A session in which a drawn checker has run this order already: what one says counts after
    the next is drawn too."""
    for checker in check.checkers:
        for session in await desk.sessions_with(checker):
            if await _answer(desk, check, session) is not None:
                return session
    return None


async def _answer(desk: DisputeDesk, check: Check, session: str) -> tuple[bytes, ...] | None:
    """The checker's agreement, the order and its signed end, as evidence; None without one."""
    papers = await desk.papers(session)
    contract = agreements.join(papers.by_buyer, papers.by_seller, network=desk.network)
    kept = pleading.choose(await desk.kept(session))
    dossier = Dossier(contract, network=desk.network)
    dossier.add(kept, party=desk.key.peer_id)
    for n, order in work.orders(dossier.main).items():
        if work.same_order(check.order, order) and work.result_of(dossier.main, n) is not None:
            shown = pleading.only(kept, n)
            return (papers.by_buyer, papers.by_seller, *shown)
    return None
