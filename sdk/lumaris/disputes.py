"""Disputes in the hands of a party: from a profile's folder to the coordinator and back.

A buyer's folder and a node's both work: either keeps its key, its standing with the coordinator,
the papers of each session, and what both sides signed in it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import trio

from lumaris import membership
from lumaris.coordinator import CoordinatorLink, link_in, open_link
from lumaris.membership import CACHE_NAME, Standing
from lumaris.profile import Profile
from lumaris_overlay.evidence import read_evidence
from lumaris_overlay.private_files import load_or_create_key
from lumaris_protocol import agreements, codec, coordinator_api, dispute_file, pleading, rulings
from lumaris_protocol.agreements import Contract
from lumaris_protocol.coordinator_api import Dispute, DisputeDetail, Request
from lumaris_protocol.dispute_file import DisputeFile
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.machines.dispute import OPEN
from lumaris_protocol.messages.dispute import DisputeClaim, DisputeOpen
from lumaris_protocol.messages.execution import WorkOrder
from lumaris_protocol.rulings import Dossier, work
from lumaris_protocol.settlement import Papers

T = TypeVar("T")

NODE_KEY: Final = "node.key"
_NODE_DATABASE: Final = "node.db"
_LOCKED_S: Final = 5.0
# A list is for people; whoever has more disputes reads them over the API.
_PAGES_MAX: Final = 32
# What rests on a claim that the other side sent to the coordinator.
_BY_THEIR_CLAIM: Final = ("forged_voucher", "stale_voucher")
# The evidence that a claim can rest on, in words.
NEEDS: Final[dict[str, str]] = {
    "equivocation": "two documents of the other side that cannot both be true",
    "forged_voucher": "a claim of the seller with a voucher that was not signed",
    "stale_voucher": "a voucher, and the buyer's own claim with less",
    "not_delivered": "more paid than the delivered work is worth",
    "unpaid_delivery": "delivered work that is worth more than was vouchered",
    "wrong_result": "the order and what was delivered for it",
}


@dataclass(frozen=True)
class Draft:
    """A dispute before anything is signed: what is claimed, what it costs, what it rests on."""

    contract: Contract
    grant: bytes
    claim: DisputeClaim
    order: int
    amount_nanos: int
    evidence: tuple[bytes, ...]
    opener: str
    their_bond_nanos: int  # what the other side's bond has for this now
    checkers: int  # sellers that could be drawn now

    @property
    def bond_nanos(self) -> int:
        """What opening it takes from the account."""
        return rulings.opener_bond(self.amount_nanos)

    @property
    def dispute(self) -> str:
        """The id that follows from the claim."""
        return rulings.dispute_id(
            self.contract.hash, opener=self.opener, claim=self.claim, order=self.order
        )

    @property
    def respondent(self) -> str:
        """The other party."""
        agreement = self.contract.agreement
        return agreement.seller if self.opener == agreement.buyer else agreement.buyer


class DisputeDesk:
    """What a party can do about disputes. Made by `open_desk`, or from an open buyer."""

    def __init__(
        self,
        link: CoordinatorLink,
        key: KeyPair,
        standing: Standing,
        folder: Path,
        database: Path,
        *,
        renew: Callable[[], Awaitable[Standing]] | None = None,
        flush: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`renew` registers again when the coordinator does not take our token; `flush` writes what
        this program has not written yet of its jobs."""
        self.key, self.standing = key, standing
        self._link, self._folder, self._database = link, folder, database
        self._renew, self._flush = renew, flush

    @property
    def network(self) -> str:
        """The network that documents are signed for."""
        return self.standing.info.network

    async def draft(
        self,
        name: str,
        claim: DisputeClaim,
        *,
        order: int = 0,
        amount_nanos: int | None = None,
        documents: tuple[bytes, ...] = (),
    ) -> Draft:
        """A dispute about a session, or the session of a job, with what we kept of it.

        Without an amount the most that the evidence shows is asked. `documents` are shown beside
        what was kept; a claim of the other side is no part of a session, and the coordinator is
        asked for it where one is needed. Raises LumarisError:
        `not_found` or `evidence_insufficient` for what is not here, `not_disputable` for what
        cannot be claimed.
        """
        if self._flush is not None:
            await self._flush()
        papers, ordered = await trio.to_thread.run_sync(self._papers, name)
        if papers.grant is None:
            raise LumarisError("not_disputable", "No money was held for this session.")
        contract = agreements.join(papers.by_buyer, papers.by_seller, network=self.network)
        us, sold_by_us = self.key.peer_id, contract.agreement.seller == self.key.peer_id
        if claim == "wrong_result" and not sold_by_us:
            order = order or ordered
            if not order:
                raise LumarisError("usage", "Which result is wrong? Name the job, or give --order.")
        rulings.check_claim(contract.agreement, claim, order=order, opener=us)
        asked = await self._ask(partial(coordinator_api.escrow_claims, papers.session))
        if claim in rulings.REFUNDS and not asked.paid_nanos:
            raise LumarisError(
                "not_disputable",
                "The seller was paid nothing that it could give back.",
                hint="What it does not claim returns to you; dispute what it takes once it has.",
            )
        if claim in _BY_THEIR_CLAIM and not documents:
            documents = tuple(one.document for one in asked.claims if one.by != us)
        kept = await self.kept(papers.session)
        room = pleading.first_bundle_room().less(documents)
        evidence = (*documents, *pleading.choose(kept, order=order, room=room))
        dossier = Dossier(contract, network=self.network)
        dossier.add(evidence, party=us)
        if amount_nanos is None:
            amount_nanos = pleading.asked(
                dossier.main, claim, order=order, paid_nanos=papers.total_nanos
            )
            self._check_shown(claim, amount_nanos)
        return Draft(
            contract,
            papers.grant,
            claim,
            order,
            amount_nanos,
            evidence,
            us,
            asked.buyer_bond_nanos if sold_by_us else asked.seller_bond_nanos,
            asked.checkers,
        )

    def _check_shown(self, claim: DisputeClaim, amount_nanos: int) -> None:
        """By our own documents the claim must come to something, unless it is about fraud."""
        if not amount_nanos and claim in ("not_delivered", "unpaid_delivery", "wrong_result"):
            raise LumarisError(
                "evidence_insufficient",
                f"What was kept of this session does not show {NEEDS[claim]}.",
                hint="--amount asks for a sum all the same; a refuted claim costs the bond.",
            )

    async def open(self, draft: Draft) -> Dispute:
        """Sign a draft and send it: the bond is taken, what is disputed is frozen.

        Raises LumarisError as the coordinator refuses it; nothing has happened then. `busy` says
        that no answer came, and that it is not known.
        """
        body = pleading.opening(
            draft.contract,
            draft.grant,
            self.key,
            draft.claim,
            order=draft.order,
            amount_nanos=draft.amount_nanos,
            evidence=draft.evidence,
            network=self.network,
            now=int(time.time()),
        )
        try:
            return await self._send(coordinator_api.open_dispute(body))
        except LumarisError as error:
            if error.code == "dispute_open":
                raise LumarisError(
                    error.code,
                    f"You have made this claim before, in the dispute {draft.dispute}.",
                    hint=f"`lumaris dispute show {draft.dispute}` says how it stands.",
                ) from None
            if error.code != "coordinator_unreachable":
                raise
            raise LumarisError(
                "busy",
                "No answer came: whether the dispute is open and its bond taken is not known.",
                hint="`lumaris dispute show` tells. Opening it again takes no second bond.",
            ) from None

    async def disputes(self) -> list[Dispute]:
        """Our disputes, oldest first."""
        found: list[Dispute] = []
        after = 0
        for _ in range(_PAGES_MAX):
            page = await self._ask(partial(coordinator_api.disputes, after=after))
            found += page.disputes
            if page.next is None or page.next <= after:
                break
            after = page.next
        return found

    async def show(self, dispute: str) -> DisputeDetail:
        """One dispute. Raises LumarisError `not_found`."""
        return await self._ask(partial(coordinator_api.dispute, dispute))

    async def file(self, dispute: str) -> bytes:
        """The dispute file, for anyone to replay. Raises LumarisError `not_found` or `busy`."""
        return await self._ask(partial(coordinator_api.dispute_document, dispute))

    async def add_evidence(
        self, dispute: str, *, documents: tuple[bytes, ...] | None = None, done: bool = False
    ) -> tuple[Dispute, int]:
        """Show these documents, or what we kept and have not shown; the dispute, and how many.

        With `done` we have no more to show. Raises LumarisError `evidence_insufficient` when there
        is nothing to say, or our own claim would fail by it, and `dispute_closed` after our last
        word.
        """
        state = (await self.show(dispute)).state
        if state not in OPEN:
            raise LumarisError("dispute_closed", f"The dispute is over: {state}.")
        file = dispute_file.decode(await self.file(dispute))
        opened, contract = self.opened(file, dispute)
        before = pleading.shown_by(file, self.key.peer_id)
        if before.closed:
            raise LumarisError("dispute_closed", "You have said that you have no more to show.")
        if documents is None:
            shown = set(before.documents)
            fresh = [one for one in await self.kept(contract.agreement.session) if one not in shown]
            room = pleading.Room().less(before.documents)
            documents = pleading.choose(fresh, order=opened.order, room=room)
        if not documents and not done:
            raise LumarisError(
                "evidence_insufficient",
                "There is nothing here that was not shown.",
                hint="--done says so, and the ruling need not wait for you.",
            )
        if done and opened.claim == "wrong_result" and opened.opener == self.key.peer_id:
            self._check_proven((*before.documents, *documents))
        found: Dispute | None = None
        for bundle in pleading.bundles(
            dispute,
            contract.hash,
            self.key,
            documents,
            n=before.bundles,
            done=done,
            network=self.network,
            now=int(time.time()),
        ):
            found = await self._send(coordinator_api.add_evidence(dispute, bundle))
        assert found is not None, "there is a bundle for nothing too"
        return found, len(documents)

    def _check_proven(self, shown: Iterable[bytes]) -> None:
        """Without a second run nothing is proven, and an opener's last word ends nothing."""
        if not pleading.shows_another_run(shown):
            raise LumarisError(
                "evidence_insufficient",
                "No second run of the order is shown, and the ruling waits for one.",
                hint="Have it checked first, or withdraw: `lumaris dispute check`.",
            )

    async def withdraw(self, dispute: str) -> Dispute:
        """Take our claim back. Raises LumarisError `forbidden`, `dispute_closed`."""
        shown = await self.show(dispute)
        body = pleading.withdrawal(
            dispute, shown.agreement_hash, self.key, network=self.network, now=int(time.time())
        )
        return await self._send(coordinator_api.withdraw_dispute(dispute, body))

    def opened(self, file: DisputeFile, dispute: str) -> tuple[DisputeOpen, Contract]:
        """The opening in a dispute's file and its agreement.

        Raises LumarisError, for the file of another dispute too: its id follows from the claim, so
        nobody can show us other papers under it.
        """
        signed = codec.open_signed(file.opened, DisputeOpen, network=self.network)
        message = signed.message
        contract = agreements.join(
            message.agreement_by_buyer, message.agreement_by_seller, network=self.network
        )
        rulings.check_opening(message, contract)
        if message.dispute != dispute or signed.signer != message.opener:
            raise LumarisError("dispute_invalid", "The dispute file is another dispute's.")
        return message, contract

    def disputed_order(self, file: DisputeFile, dispute: str) -> tuple[WorkOrder, Contract]:
        """The order that a result is disputed of, by us. Raises LumarisError `forbidden`,
        `evidence_insufficient`."""
        opened, contract = self.opened(file, dispute)
        if opened.opener != self.key.peer_id:
            raise LumarisError("forbidden", "The party that disputes a result has it checked.")
        dossier = Dossier(contract, network=self.network)
        dossier.add(opened.evidence, party=opened.opener)
        order = work.orders(dossier.main).get(opened.order)
        if order is None:
            raise LumarisError("evidence_insufficient", "The opening shows no such order.")
        return order, contract

    async def kept(self, session: str) -> list[bytes]:
        """What both sides signed in a session, as far as it was kept. Raises LumarisError."""
        try:
            return await trio.to_thread.run_sync(read_evidence, self._folder / "evidence", session)
        except OSError as error:
            raise LumarisError("not_found", f"The evidence: {error.strerror}.") from None

    async def papers(self, session: str) -> Papers:
        """What we hold of one session. Raises LumarisError `not_found`."""
        found, _ = await trio.to_thread.run_sync(self._papers, session)
        return found

    async def sessions_with(self, seller: str) -> list[str]:
        """The newest of our sessions with a seller."""

        def read(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute(
                "SELECT session FROM session WHERE seller = ? ORDER BY started_at DESC LIMIT 16",
                (seller,),
            )
            return [str(row[0]) for row in rows]

        return await trio.to_thread.run_sync(lambda: self._read(read))

    async def _send(self, request: Request[T]) -> T:
        """A signed document: the same bytes change nothing twice, so a lost answer is asked for."""
        try:
            return await self._link.call(request)
        except LumarisError as error:
            if error.code != "coordinator_unreachable":
                raise
        return await self._link.call(request)

    async def _ask(self, make: Callable[[str], Request[T]]) -> T:
        """A call with our token. A node's token is its own to renew."""
        try:
            return await self._link.call(make(self.standing.token))
        except LumarisError as error:
            if error.code != "unauthorized":
                raise
        if self._renew is None:
            raise LumarisError(
                "unauthorized",
                "The token in this folder is not accepted.",
                hint="It is renewed by the program that the folder belongs to: start the node, or"
                " wait a minute.",
            )
        self.standing = await self._renew()
        return await self._link.call(make(self.standing.token))

    def _papers(self, name: str) -> tuple[Papers, int]:
        """The papers of a session or a job's session, and the job's order or 0."""

        def read(connection: sqlite3.Connection) -> tuple[Papers, int] | None:
            session, n = name, 0
            if name.startswith("job_"):
                row = None
                if self._database.name != _NODE_DATABASE:  # a node keeps no jobs
                    row = connection.execute(
                        "SELECT session, n FROM job WHERE job = ?", (name,)
                    ).fetchone()
                if row is None:
                    return None
                session, n = str(row[0]), int(row[1] or 0)
            row = connection.execute(
                'SELECT session, by_buyer, by_seller, "grant", voucher, total_nanos, close_buyer,'
                " close_seller FROM session WHERE session = ?",
                (session,),
            ).fetchone()
            if row is None:
                return None
            *held, close_buyer, close_seller = row
            closes = (close_buyer, close_seller) if close_buyer and close_seller else ()
            return Papers(*held, closes=closes), n

        found = self._read(read)
        if found is None:
            raise LumarisError(
                "not_found",
                f"There is no session or job {name[:80]!r} here.",
                hint="`lumaris job ls` lists jobs; --state names another folder.",
            )
        return found

    def _read(self, look: Callable[[sqlite3.Connection], T]) -> T:
        if not self._database.exists():
            raise LumarisError("not_found", f"There are no records in {self._folder}.")
        try:
            connection = sqlite3.connect(
                f"{self._database.resolve().as_uri()}?mode=ro", uri=True, timeout=_LOCKED_S
            )
            try:
                return look(connection)
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise LumarisError("not_found", f"{self._database}: {error}") from None


def is_node(folder: Path) -> bool:
    """Whether a folder is a node's."""
    return (folder / NODE_KEY).exists()


@asynccontextmanager
async def open_desk(profile: Profile) -> AsyncIterator[DisputeDesk]:
    """The desk of a buyer's profile, or of the node whose folder the profile names.

    A node is never registered from here: its registration is its own. Raises LumarisError.
    """
    folder = profile.state
    if is_node(folder):
        standing = await trio.to_thread.run_sync(_node_standing, folder)
        key = load_or_create_key(folder / NODE_KEY)
        link = link_in(folder, standing.url, key, ca_file=profile.ca_file)
        try:
            yield DisputeDesk(link, key, standing, folder, folder / _NODE_DATABASE)
        finally:
            await link.aclose()
        return
    key = load_or_create_key(profile.key_file)
    link = open_link(profile)
    cache = folder / CACHE_NAME
    try:
        standing = await membership.join(link, key, cache, url=profile.coordinator)
        # A coordinator that was set up anew at the old address does not know our token.
        renew = partial(membership.rejoin, link, key, cache, standing)
        yield DisputeDesk(link, key, standing, folder, profile.database, renew=renew)
    finally:
        await link.aclose()


def _node_standing(folder: Path) -> Standing:
    try:
        return msgspec.json.decode((folder / CACHE_NAME).read_bytes(), type=Standing)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        raise LumarisError(
            "not_found",
            f"The node of {folder} has no registration.",
            hint="Start it once: `lumaris node up`.",
        ) from None
