"""Latencies between two programs: match, negotiation, request and response, and their rivals."""

from __future__ import annotations

import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio
import uvicorn

from benchmarks import session
from benchmarks.parts.overlay_world import (
    NEEDS,
    NETWORK,
    Processes,
    advert,
    new_key,
    percentile,
    processes,
)
from benchmarks.transfer import make_context
from lumaris import profile
from lumaris.buyer import Buyer, open_buyer
from lumaris.client import make_request
from lumaris.jobs import JobRequest
from lumaris.testing.devnet import Devnet
from lumaris_overlay.links import open_links
from lumaris_overlay.ports import OverlayStream
from lumaris_protocol import codec
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.offer_index import OfferIndex

Row = Callable[..., None]
Ask = Callable[[], Awaitable[None]]
ECHO = "/lumaris/bench/1"
MESSAGE = bytes(64)
MATCHES, COLD_BUYERS = 200, 5


def measure_match(row: Row) -> None:
    """Searching directories of 10 and of 5,000 adverts, with requirements that vary."""
    found = {}
    for size in (10, 5_000):
        index = OfferIndex()
        for number in range(size):
            data = advert(new_key(), price=1 + number % 97)
            index.put(codec.open_signed(data, Advert, network=NETWORK))
        times = []
        for number in range(MATCHES):
            began = time.perf_counter()
            report = index.search(NEEDS, lease_s=60 + number, count=8)
            times.append(1e3 * (time.perf_counter() - began))
            assert len(report.matches) == 8
        found[size] = percentile(times, 50)
        holds = found[size] <= 5 if size == 5_000 else None
        row(f"match over {size} adverts p50", found[size], "ms", "<= 5" if holds else "", holds)
    ratio = found[5_000] / found[10]
    row("match, 5,000 adverts / 10", ratio, "x", "<= 2", ratio <= 2)


def measure_negotiation(row: Row) -> None:
    """Quote to countersigned agreement: on an open connection, and by a program just started."""
    with tempfile.TemporaryDirectory(prefix="lumaris-bench-") as folder:
        module = Path(folder) / "no_op.wasm"
        module.write_bytes(session.NO_OP)
        with Devnet(Path(folder) / "net", sellers=1) as net:
            net.client().close()  # funds the buyer
            trio.run(_negotiate, net, module, row)


async def _negotiate(net: Devnet, module: Path, row: Row) -> None:
    request = make_request(str(module), ["no-op"], timeout_s=60, max_cost="0.01")
    settings = profile.load(state=net.buyer_state, coordinator=net.url, overlay_linger_s=20)
    async with open_buyer(settings) as buyer:
        await buyer.run(request)  # compiles the module
        await buyer.pool.close_all()
        times = [await _timed(buyer, request) for _ in range(session.COLD_RUNS)]
    cold: list[float] = []
    for _ in range(COLD_BUYERS):
        async with open_buyer(settings) as buyer:
            cold.append(await _timed(buyer, request))
    middle, slow = percentile(times, 50), percentile(times, 99)
    row("negotiation p50, open connection", middle, "ms", "<= 20", middle <= 20)
    row("negotiation p99, open connection", slow, "ms")
    first = percentile(cold, 50)
    row("negotiation p50, cold", first, "ms", "<= 200", first <= 200)
    row("negotiation p99, cold", max(cold), "ms")


async def _timed(buyer: Buyer, request: JobRequest) -> float:
    """Milliseconds from the first question to the signed agreement of one cold run."""
    market = buyer.market
    quotes, agree = market.quotes, market.agree
    asked: list[float] = []
    agreed: list[float] = []

    async def timed_quotes(*arguments: Any, **named: Any) -> Any:
        asked.append(time.perf_counter())
        return await quotes(*arguments, **named)

    async def timed_agree(*arguments: Any) -> Any:
        result = await agree(*arguments)
        agreed.append(time.perf_counter())
        return result

    market.quotes, market.agree = timed_quotes, timed_agree  # type: ignore[method-assign, assignment]
    await buyer.run(request)
    await buyer.pool.close_all()
    market.quotes, market.agree = quotes, agree  # type: ignore[method-assign]
    return 1e3 * (agreed[0] - asked[0])


async def measure_exchange(row: Row, rounds: int) -> None:
    """64 bytes and back on an open connection, all ways in turn within one run."""
    with tempfile.TemporaryDirectory(prefix="lumaris-bench-") as folder:
        async with AsyncExitStack() as stack:
            hosts = await stack.enter_async_context(processes(Path(folder)))
            ways: dict[str, Ask] = {
                "stream through both overlay processes": await _through_overlays(hosts, stack),
                "link between the programs": await _over_link(hosts, stack),
                "trio TLS": await stack.enter_async_context(_trio_tls(Path(folder))),
                "httpx, HTTP/1.1 in the clear": await stack.enter_async_context(_httpx()),
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(rounds + 10):
                for name, ask in ways.items():
                    began = time.perf_counter()
                    await ask()
                    if number >= 10:
                        times[name].append(1e3 * (time.perf_counter() - began))
    base = percentile(times["trio TLS"], 50)
    for name, values in times.items():
        row(f"round trip p50: {name}", percentile(values, 50), "ms")
        row(f"round trip p99: {name}", percentile(values, 99), "ms")
        if name != "trio TLS":
            row(f"{name} / trio TLS", percentile(values, 50) / base, "x")


async def echo(stream: trio.abc.Stream) -> None:
    """Answer everything with itself."""
    async for data in stream:
        await stream.send_all(data)


def exchange(stream: trio.abc.Stream) -> Ask:
    """One message there and back."""

    async def ask() -> None:
        await stream.send_all(MESSAGE)
        left = len(MESSAGE)
        while left:
            left -= len(await stream.receive_some(left))

    return ask


async def _through_overlays(hosts: Processes, stack: AsyncExitStack) -> Ask:
    one, two = await hosts.add(), await hosts.add()
    await two.overlay.connect([one.address])
    await stack.enter_async_context(one.overlay.serve(ECHO, echo))
    stream: OverlayStream = await two.overlay.open_stream(one.key.peer_id, ECHO)
    stack.push_async_callback(trio.aclose_forcefully, stream)
    return exchange(stream)


async def _over_link(hosts: Processes, stack: AsyncExitStack) -> Ask:
    one, two = hosts.hosts[:2]
    seller = await stack.enter_async_context(open_links(one.overlay, listen=("127.0.0.1", 0)))
    buyer = await stack.enter_async_context(open_links(two.overlay, listen=None, answer=False))
    await stack.enter_async_context(seller.serve(ECHO + "/link", echo))
    stream = await buyer.open_stream(one.key.peer_id, ECHO + "/link")
    stack.push_async_callback(trio.aclose_forcefully, stream)
    ask = exchange(stream)
    with trio.move_on_after(5):  # until the link has moved to its own connection
        while stream.direct is None:
            await ask()
            await trio.sleep(0.01)
    return ask


@asynccontextmanager
async def _trio_tls(folder: Path) -> AsyncIterator[Ask]:
    context, _ = make_context(folder)
    client = ssl.create_default_context()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_ssl_over_tcp, echo, 0, context, host="127.0.0.1")
        listeners = await nursery.start(serve)
        port = listeners[0].transport_listener.socket.getsockname()[1]
        stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", port, ssl_context=client)
        yield exchange(stream)
        await trio.aclose_forcefully(stream)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _httpx() -> AsyncIterator[Ask]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="error"))

    def serve() -> None:
        server.run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, serve)
        while not server.started:  # noqa: ASYNC110 - a thread sets it
            await trio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", trust_env=False
        ) as client:

            async def ask() -> None:
                answer = await client.post("/", content=MESSAGE)
                assert answer.content == MESSAGE

            yield ask
        server.should_exit = True
