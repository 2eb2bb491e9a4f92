"""Webhooks: signed, in order, at least once, tried again, given up, replayed, one at a time."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lumaris_coordinator import bounds
from lumaris_coordinator.store.port import all_rows
from lumaris_coordinator.webhooks import outgoing
from lumaris_coordinator.webhooks.delivery import Deliveries, retry_after
from lumaris_coordinator.webhooks.outgoing import PinnedSender, Post, UnreachableError, check_url
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market, Party
from tests.coordinator.conftest import open_market
from tests.coordinator.test_events import tell, until
from tests.coordinator.test_users import link, peer_link, sign_up

URL = "https://hooks.example/lumaris"


class Endpoint:
    """A sender whose other end is here. `answers` are the next statuses; then 204."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int | str] = []
        self.closed = False
        self.on_post: Callable[[], Any] | None = None

    @asynccontextmanager
    async def open(self, url: str) -> AsyncIterator[Post]:
        if self.closed:
            raise UnreachableError("no_address")
        yield self.post

    async def post(self, body: bytes, headers: dict[str, str]) -> int:
        self.got.append((headers, body))
        if self.on_post is not None:
            await self.on_post()
        answer = self.answers.pop(0) if self.answers else 204
        if isinstance(answer, str):
            raise UnreachableError(answer)
        return answer

    @property
    def ids(self) -> list[int]:
        return [json.loads(body)["id"] for _, body in self.got]


@pytest.fixture
def endpoint(market: Market) -> Endpoint:
    """The other end of all webhooks. Turns are taken by the tests: see `turn`."""
    found = Endpoint()
    market.coordinator.deliveries._sender = found
    return found


def keyed(market: Market, party: Party, key: str = "k") -> dict[str, str]:
    return {**market.bearer(party), "idempotency-key": key}


async def make(
    market: Market, party: Party, *, key: str = "k", url: str = URL, kinds: tuple[str, ...] = ()
) -> dict[str, Any]:
    answer = await market.client.post(
        "/v1/webhooks", json={"url": url, "kinds": kinds}, headers=keyed(market, party, key)
    )
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def show(market: Market, party: Party, webhook: str) -> dict[str, Any]:
    answer = await market.client.get(f"/v1/webhooks/{webhook}", headers=market.bearer(party))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def replay(market: Market, party: Party, webhook: str, after: int, key: str = "r") -> Any:
    return await market.client.post(
        f"/v1/webhooks/{webhook}/replay?after={after}", headers=keyed(market, party, key)
    )


async def outcomes(market: Market, party: Party, webhook: str) -> list[tuple[Any, ...]]:
    answer = await market.client.get(
        f"/v1/webhooks/{webhook}/deliveries", headers=market.bearer(party)
    )
    found = [(d["event"], d["attempt"], d["outcome"]) for d in answer.json()["deliveries"]]
    return found[::-1]


async def test_events_arrive_signed_and_in_order(market: Market, endpoint: Endpoint) -> None:
    ann, bob = await market.party("ann"), await market.party("bob")
    await tell(market, ann)  # before the endpoint: not sent
    made = await make(market, ann)
    await tell(market, ann, bob, number=40)
    await tell(market, bob)
    await tell(market, ann)
    await until(lambda: len(endpoint.got) == 41)
    assert endpoint.ids == [*range(2, 42), 43]
    for headers, body in endpoint.got[:3]:
        key = base64.b64decode(made["secret"].removeprefix("whsec_"))
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        tag = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{tag}"
        assert headers["webhook-id"] == f"evt_{json.loads(body)['id']}"
        assert headers["webhook-timestamp"] == str(market.now)
    rows: list[Any] = []

    async def at_rest() -> bool:
        nonlocal rows
        rows = await market.coordinator.store.read(
            lambda connection: all_rows(connection, "SELECT seen, due_at, lease FROM webhook")
        )
        return rows == [(43, None, "")]

    with trio.fail_after(5):
        while not await at_rest():
            await trio.sleep(0.001)
    assert (await outcomes(market, ann, made["id"]))[-1] == (43, 1, "delivered")


@pytest.mark.slow
async def test_a_user_hears_of_its_peers(market: Market, endpoint: Endpoint) -> None:
    ann, bob = await market.party("ann"), await market.party("bob")
    user, token = await sign_up(market, "owner")
    market.tokens["owner"] = token
    await make(market, Party("owner"))
    await tell(market, ann)  # not the user's yet
    assert (await link(market, token, peer_link(market, ann, user))).status_code == 200
    await tell(market, bob)
    newest = await tell(market, ann, bob)
    await until(lambda: newest in endpoint.ids)
    paged = await market.client.get("/v1/events/page", headers=market.bearer(Party("owner")))
    assert [event["id"] for event in paged.json()["events"]] == [1, 3]
    assert endpoint.ids == [1, 3]  # from where the webhook began, whoever owned the peer then


async def test_only_the_kinds_asked_for(market: Market, endpoint: Endpoint) -> None:
    ann = await market.party("ann")
    made = await make(market, ann, kinds=("payout.paid",))
    await tell(market, ann, number=3)
    paid = await tell(market, ann, kind="payout.paid")
    await tell(market, ann)
    await until(lambda: endpoint.ids == [paid])
    assert made["kinds"] == ["payout.paid"]


async def test_a_failure_is_tried_again_and_holds_up_the_rest(
    market: Market, endpoint: Endpoint
) -> None:
    ann = await market.party("ann")
    made = await make(market, ann)
    endpoint.answers = [500, "timeout", 302]
    await tell(market, ann, number=2)
    for attempt in (1, 2, 3):
        await until(lambda: len(endpoint.got) == attempt)  # noqa: B023 - run at once
        while (await show(market, ann, made["id"]))["failures"] != attempt:
            await trio.sleep(0.001)
        market.coordinator.deliveries.wake()  # not due yet: nothing is sent
        assert not await market.coordinator.deliveries.turn(made["id"])
        assert len(endpoint.got) == attempt
        market.clock.now += bounds.WEBHOOK_RETRY_S_MIN * 2**attempt
        market.coordinator.deliveries.wake()
    await until(lambda: len(endpoint.got) == 5)
    assert endpoint.ids == [1, 1, 1, 1, 2]
    while (await show(market, ann, made["id"]))["seen"] != 2:
        await trio.sleep(0.001)
    assert await outcomes(market, ann, made["id"]) == [
        (1, 1, "refused"),
        (1, 2, "timeout"),
        (1, 3, "refused"),
        (1, 4, "delivered"),
        (2, 1, "delivered"),
    ]
    assert (await show(market, ann, made["id"]))["failing_since"] is None


def test_the_delays_double_up_to_a_bound_and_are_spread() -> None:
    longest = [retry_after(n, chance=1.0) for n in range(1, 100)]
    assert longest[:3] == [5, 10, 20]
    assert longest[-1] == bounds.WEBHOOK_RETRY_S_MAX
    assert [retry_after(n, chance=0.0) for n in (1, 3)] == [2, 10]


async def test_three_days_of_failure_disable_and_a_replay_goes_on(
    market: Market, endpoint: Endpoint
) -> None:
    ann = await market.party("ann")
    made = await make(market, ann)
    endpoint.closed = True
    await tell(market, ann, number=3)
    while not (await show(market, ann, made["id"]))["failures"]:
        await trio.sleep(0.001)
    market.clock.now += bounds.WEBHOOK_GIVE_UP_S
    await market.register(ann)
    market.coordinator.deliveries.wake()
    while (found := await show(market, ann, made["id"]))["state"] == "active":
        await trio.sleep(0.001)
    assert found["reason"] == "dead letter: event 1"
    assert (await outcomes(market, ann, made["id"]))[-1] == (1, 2, "dead")
    endpoint.closed = False
    await tell(market, ann)
    assert not await market.coordinator.deliveries.turn(made["id"])
    assert endpoint.got == []
    answer = await replay(market, ann, made["id"], after=1)
    assert (answer.status_code, answer.json()["state"]) == (200, "active")
    await until(lambda: endpoint.ids == [2, 3, 4])
    again = await replay(market, ann, made["id"], after=1)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.content == answer.content


async def test_an_endpoint_that_is_gone_is_disabled_at_once(
    market: Market, endpoint: Endpoint
) -> None:
    ann = await market.party("ann")
    made = await make(market, ann)
    endpoint.answers = [410]
    await tell(market, ann)
    while (found := await show(market, ann, made["id"]))["state"] == "active":
        await trio.sleep(0.001)
    assert found["reason"] == "gone"


async def test_a_replay_during_a_delivery_wins(market: Market, endpoint: Endpoint) -> None:
    ann = await market.party("ann")
    made = await make(market, ann)

    async def meanwhile() -> None:
        endpoint.on_post = None
        assert (await replay(market, ann, made["id"], after=0)).status_code == 200

    endpoint.on_post = meanwhile
    await tell(market, ann, number=2)
    await until(lambda: len(endpoint.got) == 3)
    assert endpoint.ids == [1, 1, 2]


async def test_a_replay_of_nothing_comes_to_rest(
    market: Market, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await market.party("ann")
    made = await make(market, ann)
    newest = await tell(market, ann)
    await until(lambda: endpoint.ids == [newest])
    turns: list[str] = []
    real = market.coordinator.deliveries.turn

    async def counted(name: str) -> bool:
        turns.append(name)
        return await real(name)

    monkeypatch.setattr(market.coordinator.deliveries, "turn", counted)
    answer = await replay(market, ann, made["id"], after=10**9)  # no further than there is
    assert answer.json()["seen"] == newest

    async def at_rest() -> bool:
        return bool(turns) and await market.coordinator.store.read(
            lambda connection: (
                all_rows(connection, "SELECT due_at, lease FROM webhook") == [(None, "")]
            )
        )

    with trio.fail_after(5):
        while not await at_rest():
            await trio.sleep(0.001)
    market.coordinator.deliveries.wake()
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert turns == [made["id"]]
    assert endpoint.ids == [newest]


async def test_what_was_not_acknowledged_is_sent_after_a_crash(tmp_path: Path) -> None:
    """The process dies after the endpoint got an event and before that was noted."""
    first, second = Endpoint(), Endpoint()
    async with open_market(tmp_path / "state") as market:
        market.coordinator.deliveries._sender = first
        first.on_post = trio.sleep_forever
        ann = await market.party("ann")
        await make(market, ann)
        await tell(market, ann, number=2)
        await until(lambda: first.ids == [1])
        clock = market.clock
    async with open_market(tmp_path / "state", clock=clock) as market:
        market.coordinator.deliveries._sender = second
        market.coordinator.deliveries.wake()
        assert second.got == []  # the lease of the dead one still holds
        clock.now += bounds.WEBHOOK_LEASE_S
        market.coordinator.deliveries.wake()
        await until(lambda: second.ids == [1, 2])


async def test_what_was_committed_before_a_start_is_sent(tmp_path: Path) -> None:
    async with open_market(tmp_path / "state") as market:
        market.coordinator.deliveries.hear = lambda events: None  # type: ignore[method-assign]
        market.coordinator.events._listeners.clear()
        ann = await market.party("ann")
        await make(market, ann)
        await tell(market, ann, number=2)
        clock = market.clock
    endpoint = Endpoint()
    async with open_market(tmp_path / "state", clock=clock) as market:
        market.coordinator.deliveries._sender = endpoint
        market.coordinator.deliveries.wake()
        await until(lambda: endpoint.ids == [1, 2])


async def test_two_processes_do_not_deliver_side_by_side(
    market: Market, endpoint: Endpoint
) -> None:
    ann = await market.party("ann")
    made = await make(market, ann)
    other = Endpoint()
    replica = Deliveries(market.coordinator.context, other)
    let_go = trio.Event()
    endpoint.on_post = let_go.wait
    await tell(market, ann)
    await until(lambda: len(endpoint.got) == 1)
    await tell(market, ann)
    assert not await replica.turn(made["id"])
    assert other.got == []
    let_go.set()
    await until(lambda: endpoint.ids == [1, 2])


async def test_owners_only(market: Market, endpoint: Endpoint) -> None:
    ann, eve = await market.party("ann"), await market.party("eve")
    made = await make(market, ann)
    path = f"/v1/webhooks/{made['id']}"
    for method, where in (("GET", path), ("GET", f"{path}/deliveries"), ("DELETE", path)):
        answer = await market.client.request(method, where, headers=market.bearer(eve))
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert (await market.client.request(method, where)).status_code == 401
    assert (await replay(market, eve, made["id"], after=0)).status_code == 404
    listed = (await market.client.get("/v1/webhooks", headers=market.bearer(eve))).json()
    assert listed == {"webhooks": []}
    shown = await market.client.get(path, headers=market.bearer(ann))
    assert "secret" not in shown.json()
    tag = shown.headers["etag"]
    headers = {**market.bearer(ann), "if-none-match": tag}
    assert (await market.client.get(path, headers=headers)).status_code == 304
    stale = {**market.bearer(ann), "if-match": '"other"'}
    answer = await market.client.delete(path, headers=stale)
    assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed")
    answer = await market.client.delete(path, headers={**market.bearer(ann), "if-match": tag})
    assert (answer.status_code, answer.content) == (204, b"")
    assert (await market.client.get(path, headers=market.bearer(ann))).status_code == 404


async def test_secrets_are_shown_once_and_not_kept_in_the_clear(market: Market) -> None:
    ann = await market.party("ann")
    made = await make(market, ann)
    again = await make(market, ann)  # a repeat under the same key is the same answer
    assert again == made
    assert made["secret"].startswith("whsec_")
    kept = b"".join(
        path.read_bytes()
        for path in market.coordinator.settings.state.iterdir()
        if path.name.startswith("coordinator.db")
    )
    assert made["id"].encode() in kept
    assert made["secret"].removeprefix("whsec_").encode() not in kept


async def test_their_number_is_bounded(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = await market.party("ann")
    for n in range(bounds.WEBHOOKS_PER_PRINCIPAL_MAX):
        await make(market, ann, key=f"k{n}")
    answer = await market.client.post(
        "/v1/webhooks", json={"url": URL}, headers=keyed(market, ann, "more")
    )
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many")


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example/",
        "ftp://hooks.example/",
        "https://user:pw@hooks.example/",
        "https://hooks.example/#part",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1/",
        "https://[::ffff:10.0.0.1]/",
        "https://hooks.example:0/",
        "https://hooks.example:99999/",
        "https:///path",
        "https://hooks.example/ x",
        "https://hooks.example/\n",
        "//hooks.example/",
        "hooks.example",
        "",
        "https://" + "a" * 3_000,
    ],
)
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(LumarisError) as caught:
        check_url(url, loopback=False)
    assert caught.value.code == "unsafe_url"


def test_loopback_is_for_trying_things_out_only() -> None:
    check_url("http://127.0.0.1:8080/hook", loopback=True)
    check_url(URL, loopback=False)
    with pytest.raises(LumarisError):
        check_url("http://10.0.0.1/hook", loopback=True)


@pytest.mark.parametrize("addresses", [["10.0.0.8"], ["1.1.1.1", "192.168.0.1"], ["::1"], []])
async def test_a_name_that_leads_inside_is_not_followed(
    addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(2, 1, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr("lumaris_coordinator.webhooks.outgoing.look_up", resolve)
    with pytest.raises(UnreachableError) as caught:
        async with PinnedSender().open(URL):
            pass
    assert caught.value.reason == ("unsafe_address" if addresses else "no_address")


async def test_a_name_over_http_never_leaves_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(2, 1, 6, "", ("1.1.1.1", port))]

    monkeypatch.setattr("lumaris_coordinator.webhooks.outgoing.look_up", resolve)
    with pytest.raises(UnreachableError, match="unsafe_address"):
        async with PinnedSender(loopback=True).open("http://hooks.example/"):
            pass


def certificate(tmp_path: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server, client) contexts for a self-signed certificate of a name."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=40_000))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "server.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(file)
    client = ssl.create_default_context(
        cadata=made.public_bytes(serialization.Encoding.PEM).decode()
    )
    return server, client


@asynccontextmanager
async def receiver(
    answer: bytes, context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server on loopback that answers whatever it gets; (port, requests)."""
    requests: list[bytes] = []

    async def handle(plain: trio.SocketStream) -> None:
        stream: Any = plain
        if context is not None:
            stream = trio.SSLStream(plain, context, server_side=True, https_compatible=True)
        try:
            got = b""
            while b"\r\n\r\n" not in got or not got.endswith(b"}"):
                part = await stream.receive_some(4_096)
                if not part:
                    return
                got += part
            requests.append(got)
            await stream.send_all(answer)
            await stream.receive_some(1)
        except (trio.BrokenResourceError, ssl.SSLError):
            return
        finally:
            await plain.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield port, requests
        nursery.cancel_scope.cancel()


async def test_a_delivery_over_tls_goes_to_the_checked_address_and_the_name_is_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = certificate(tmp_path, "hooks.example")
    asked: list[str] = []

    async def resolve(host: str, port: int, **options: Any) -> list[Any]:
        asked.append(host)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    answer = b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n"
    monkeypatch.setattr("lumaris_coordinator.webhooks.outgoing.look_up", resolve)
    async with receiver(answer, server) as (port, requests):
        sender = PinnedSender(loopback=True, trusted=client)
        async with sender.open(f"https://hooks.example:{port}/in?x=1") as post:
            assert await post(b"{}", {"webhook-id": "evt_1"}) == 302
        head = requests[0].decode()
        assert head.startswith("POST /in?x=1 HTTP/1.1\r\n")
        assert f"host: hooks.example:{port}\r\n" in head.lower()
        async with sender.open(f"https://other.example:{port}/") as post:
            with pytest.raises(UnreachableError, match="no_connection"):
                await post(b"{}", {})
    assert asked == ["hooks.example", "other.example"]


async def test_an_endpoint_that_keeps_silent_costs_its_time_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        receiver(b"") as (port, _),
        PinnedSender(loopback=True).open(f"http://127.0.0.1:{port}/") as post,
    ):
        monkeypatch.setattr(outgoing, "WEBHOOK_ATTEMPT_S_MAX", 0.02)
        with pytest.raises(UnreachableError, match="timeout"):
            await post(b"{}", {})


async def test_an_endless_answer_is_not_read() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n\r\n" + b"x" * 4_096
    async with (
        receiver(answer) as (port, _),
        PinnedSender(loopback=True).open(f"http://127.0.0.1:{port}/") as post,
    ):
        assert await post(b"{}", {}) == 200


async def test_what_the_request_must_say(market: Market) -> None:
    ann = await market.party("ann")
    for body, code in (
        (b"{}", "malformed"),
        (b"[]", "malformed"),
        (b'{"url": 7}', "malformed"),
        (b'{"url": "https://hooks.example/", "more": 1}', "malformed"),
        (b'{"url": "https://hooks.example/", "kinds": ["nothing.known"]}', "malformed"),
        (b'{"url": "http://hooks.example/"}', "unsafe_url"),
    ):
        answer = await market.client.post(
            "/v1/webhooks", content=body, headers=keyed(market, ann, "same")
        )
        assert answer.json()["code"] == code, answer.text
    answer = await market.client.post("/v1/webhooks", json={"url": URL}, headers=market.bearer(ann))
    assert (answer.status_code, answer.json()["code"]) == (400, "idempotency_missing")


def test_a_turn_is_one_page_of_events() -> None:
    assert bounds.WEBHOOK_TURN_MAX <= bounds.EVENTS_PAGE_MAX
