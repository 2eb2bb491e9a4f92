"""A buyer and a seller that cheats: the job fails with the code, nothing is paid, work goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
from msgspec import structs

from lumaris_node.orders import OrderRun
from lumaris_overlay.bulk import wire
from lumaris_overlay.framed_stream import FramedStream
from lumaris_protocol import ids, pricing
from lumaris_protocol.effects import Effect, Send
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind
from lumaris_protocol.machines.seller import SellerSession
from lumaris_protocol.messages.execution import File, JobEvent, LogChunk
from tests import market as m
from tests.market import Market

pytestmark = [pytest.mark.slow, pytest.mark.planet]

Patch = Callable[[pytest.MonkeyPatch], None]


def overcharge(patch: pytest.MonkeyPatch) -> None:
    honest = pricing.order_nanos
    patch.setattr(pricing, "order_nanos", lambda terms, wall_ms: honest(terms, wall_ms + 5000))


def other_log(patch: pytest.MonkeyPatch) -> None:
    honest = OrderRun._log_file

    def log_file(self: OrderRun, stream: Any) -> File:
        return structs.replace(honest(self, stream), sha256=ids.digest(b"another log"))

    patch.setattr(OrderRun, "_log_file", log_file)


def longer_log(patch: pytest.MonkeyPatch) -> None:
    honest = OrderRun._log_file

    def log_file(self: OrderRun, stream: Any) -> File:
        return structs.replace(honest(self, stream), size_bytes=999)

    patch.setattr(OrderRun, "_log_file", log_file)


def delivering(*paths: str) -> Patch:
    def cheat(patch: pytest.MonkeyPatch) -> None:
        files = tuple(File(path=path, size_bytes=1, sha256=ids.digest(b"x")) for path in paths)
        patch.setattr(OrderRun, "_collect", lambda self: files)

    return cheat


def too_much(patch: pytest.MonkeyPatch) -> None:
    file = File(path="b", size_bytes=1 << 29, sha256=ids.digest(b"x"))
    patch.setattr(OrderRun, "_collect", lambda self: (file,))


def other_bytes(patch: pytest.MonkeyPatch) -> None:
    def send(to: wire.Wire, file: int, first: int, count: int, size_bytes: int) -> None:
        to.send(b"x" * size_bytes)

    patch.setattr(wire, "send_chunks", send)


def fewer_bytes(patch: pytest.MonkeyPatch) -> None:
    async def give(stream: FramedStream, *_: Any, **__: Any) -> None:
        await stream.send(Kind.HEADER, b'{"state":"ready"}')
        await stream.receive()
        await stream.send(Kind.DATA, b"w")
        await stream.send(Kind.END)

    patch.setattr("lumaris_node.session.give_file", give)


def more_bytes(patch: pytest.MonkeyPatch) -> None:
    async def give(stream: FramedStream, *_: Any, **__: Any) -> None:
        await stream.send(Kind.HEADER, b'{"state":"ready"}')
        for _n in range(5):
            await stream.send(Kind.DATA, b"y" * 100_000)
        await stream.send(Kind.END)

    patch.setattr("lumaris_node.session.give_file", give)


def delivered_twice(patch: pytest.MonkeyPatch) -> None:
    honest = SellerSession.delivered

    def delivered(self: SellerSession, *parts: Any, **fields: Any) -> list[Effect]:
        return 2 * honest(self, *parts, **fields)

    patch.setattr(SellerSession, "delivered", delivered)


def instead_of_delivery(make: Callable[[SellerSession, int], bytes]) -> Patch:
    def cheat(patch: pytest.MonkeyPatch) -> None:
        def delivered(self: SellerSession, n: int, **fields: Any) -> list[Effect]:
            return [Send(make(self, n))]

        patch.setattr(SellerSession, "delivered", delivered)

    return cheat


def ending(reason: str) -> Callable[[SellerSession, int], bytes]:
    def make(session: SellerSession, n: int) -> bytes:
        named = {"n": n, "order_hash": session._reports.order_hash(n)}
        return session._chain.sign(JobEvent, **named, state="failed", reason=reason, at=0).data

    return make


def log_with_a_gap(session: SellerSession, n: int) -> bytes:
    return session._chain.sign(LogChunk, n=n, stream="stdout", offset=99, data=b"x").data


@pytest.mark.parametrize(
    ("cheat", "reason"),
    [
        (overcharge, "overcharged"),
        (other_log, "output_mismatch"),
        (longer_log, "output_mismatch"),
        (delivering("../evil"), "output_mismatch"),
        (delivering("/etc/evil"), "output_mismatch"),
        (delivering("a", "a/b"), "output_mismatch"),
        (delivering("a", "a"), "output_mismatch"),
        (delivering("never made"), "platform_error"),
        (too_much, "oversize"),
        (other_bytes, "output_mismatch"),
        (fewer_bytes, "output_mismatch"),
        (more_bytes, "oversize"),
        (delivered_twice, "replayed"),
        (instead_of_delivery(ending("succeeded")), "platform_error"),
        (instead_of_delivery(ending("no_such")), "platform_error"),
        (instead_of_delivery(log_with_a_gap), "out_of_sequence"),
        (instead_of_delivery(lambda session, n: b"noise"), "malformed"),
    ],
)
async def test_a_cheat_earns_nothing(market: Market, tmp_path, cheat: Patch, reason: str):
    (tmp_path / "a").write_bytes(b"words")
    await market.seller()
    async with market.buyer() as buyer:
        request = market.request(m.COPY, inputs={"a": tmp_path / "a"})
        first = await buyer.run(request)
        assert first.ok
        with pytest.MonkeyPatch.context() as patch:
            cheat(patch)
            result = await buyer.run(request)
        assert (result.reason, result.cost_nanos) == (reason, 0), result.detail
        assert not result.ok
        assert not list((tmp_path / "buyer").rglob("evil"))
        again = await buyer.run(request)
        assert again.ok
        await market.assert_at_rest(buyer, cost_nanos=first.cost_nanos + again.cost_nanos)


async def test_a_seller_that_stops_reading_an_upload(market: Market, tmp_path, monkeypatch):
    """A stalled transfer fails its job only, not the buyer's program."""
    monkeypatch.setattr(wire, "STALL_S", 0.2)
    (tmp_path / "a").write_bytes(bytes(2_000_000))
    await market.seller()

    async def stall(*_: object, **__: object) -> None:
        await trio.sleep_forever()

    async with market.buyer() as buyer:
        assert (await buyer.run(market.request(m.HELLO))).ok
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lumaris_node.inputs.take_file", stall)
            result = await buyer.run(market.request(m.COPY, inputs={"a": tmp_path / "a"}))
        assert (result.reason, result.cost_nanos) == ("unreachable", 0)
        assert (await buyer.run(market.request(m.HELLO))).ok


async def test_a_quote_above_the_advert_is_refused(market: Market, monkeypatch):
    seller = await market.seller()
    async with market.buyer() as buyer:
        honest = seller.quotes.offer

        def dearer(*parts: Any, **fields: Any) -> Any:
            quote = honest(*parts, **fields)
            terms = structs.replace(quote.terms, rate_nanos_per_s=quote.terms.rate_nanos_per_s + 1)
            return structs.replace(quote, terms=terms)

        monkeypatch.setattr(seller.quotes, "offer", dearer)
        with pytest.raises(LumarisError) as caught:
            await buyer.run(market.request(m.HELLO))
        assert caught.value.code == "terms_changed"
        assert market.requests("POST /v1/grants") == 0
        await market.assert_at_rest(buyer, cost_nanos=0)
