"""The one way out of a sandbox: an HTTP proxy that listens inside it and connects from outside.

A sandbox has a network namespace with nothing in it but its loopback. The node listens there, on
the port that the guest finds in HTTP_PROXY, and connects from its own namespace to what the policy
allows. So the guest has no route, no name server and no packet of its own on any network. CONNECT
serves everything over TLS and any other protocol; plain `http://` requests are passed on one at a
time. Heads are parsed by h11, which bounds them.
"""

from __future__ import annotations

import logging
from collections import Counter
from urllib.parse import urlsplit

import h11
import trio

from lumaris_node.egress.policy import EgressPolicy
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)

PORT = 3128
# A browser opens six to a host; more wait in the listener's backlog.
_CONNECTIONS_MAX = 64
_HEAD_S = 30
_CONNECT_S = 10
_IDLE_S = 300
_READ_BYTES = 64 * 1024
_HEAD_BYTES_MAX = 32 * 1024
# Headers for the proxy alone, and the host, which is the URL's and not another.
_OURS = frozenset(
    b"host connection proxy-connection keep-alive te trailer upgrade proxy-authorization".split()
)
_STATUS = {"egress_refused": 403, "unreachable": 502, "malformed": 400}


def environment() -> dict[str, str]:
    """What a guest is told, so that programs find the proxy by themselves."""
    url = f"http://127.0.0.1:{PORT}"
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    return dict.fromkeys(names, url) | {"NO_PROXY": "127.0.0.1,localhost"}


class EgressProxy:
    """The proxy of one job. Its counts are for the log and the owner."""

    def __init__(self, policy: EgressPolicy) -> None:
        self._policy = policy
        self._limiter = trio.CapacityLimiter(_CONNECTIONS_MAX)
        self.connected: Counter[str] = Counter()  # by host:port
        self.refused: Counter[str] = Counter()  # by code
        self.bytes_out = self.bytes_in = 0

    async def serve(self, listener: trio.SocketListener) -> None:
        """Answer the guest until cancelled; closes the listener."""
        async with listener, trio.open_nursery() as nursery:
            while True:
                await self._limiter.acquire_on_behalf_of(token := object())
                try:
                    stream = await listener.accept()
                except BaseException:
                    self._limiter.release_on_behalf_of(token)
                    raise
                nursery.start_soon(self._answer, stream, token)

    async def _answer(self, guest: trio.SocketStream, token: object) -> None:
        try:
            async with guest:
                await _Exchange(self, self._policy, guest).run()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # the guest, or what it spoke to, went away
        except* h11.ProtocolError as group:
            log.info("egress ended error=%r", group.exceptions[0])
        except* Exception as group:
            log.error("egress failed", exc_info=group)
        finally:
            self._limiter.release_on_behalf_of(token)


class _Exchange:
    """One connection of the guest: one request, then bytes both ways until both sides end."""

    def __init__(self, proxy: EgressProxy, policy: EgressPolicy, guest: trio.SocketStream) -> None:
        self._proxy, self._policy, self._guest = proxy, policy, guest
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES_MAX)
        self._moved_at = trio.current_time()

    async def run(self) -> None:
        try:
            with trio.fail_after(_HEAD_S):
                request = await self._next()
            if not isinstance(request, h11.Request):
                return
            host, port = _target(request)
            remote = await self._connect(host, port)
        except h11.RemoteProtocolError as error:
            await self._refuse(LumarisError("malformed", str(error)))
            return
        except LumarisError as error:
            await self._refuse(error)
            return
        async with remote:
            if request.method == b"CONNECT":
                await self._tunnel(remote)
            else:
                await self._forward(request, remote)

    async def _next(self) -> h11.Event | None:
        """The guest's next event; None when it waits for our answer or has nothing more to say."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._guest.receive_some(_READ_BYTES))
        return event if isinstance(event, h11.Event) else None

    async def _connect(self, host: str, port: int) -> trio.SocketStream:
        for ip in await self._policy.addresses(host, port):
            try:
                with trio.fail_after(_CONNECT_S):
                    remote = await trio.open_tcp_stream(ip, port)
            except (OSError, trio.TooSlowError):
                continue
            self._proxy.connected[f"{host}:{port}"] += 1
            return remote
        raise LumarisError("unreachable", f"{host}:{port} does not answer.")

    async def _refuse(self, error: LumarisError) -> None:
        self._proxy.refused[error.code] += 1
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = f"{error.code}: {error.message}\n".encode()
        headers = [("Content-Length", str(len(body))), ("Connection", "close")]
        status = _STATUS.get(error.code, 502)
        head = h11.Response(status_code=status, headers=headers)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            await self._guest.send_all(self._http.send(event) or b"")

    async def _tunnel(self, remote: trio.SocketStream) -> None:
        answer = self._http.send(h11.Response(status_code=200, headers=[]))
        await self._guest.send_all(answer or b"")
        early, _ = self._http.trailing_data
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, remote, self._guest, "in")
            if early:
                await remote.send_all(early)
                self._count("out", len(early))
            await self._pump(self._guest, remote, "out")

    async def _forward(self, request: h11.Request, remote: trio.SocketStream) -> None:
        """One plain request with its body; the answer is passed on as it comes, until its end."""
        url = urlsplit(request.target)
        path = (url.path or b"/") + (b"?" + url.query if url.query else b"")
        headers = [(name, value) for name, value in request.headers if name not in _OURS]
        upstream = h11.Connection(h11.CLIENT)
        head = h11.Request(
            method=request.method,
            target=path,
            headers=[(b"host", url.netloc), *headers, (b"connection", b"close")],
        )
        await self._send(remote, upstream.send(head))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, remote, self._guest, "in")
            while isinstance(event := await self._next(), (h11.Data, h11.EndOfMessage)):
                await self._send(remote, upstream.send(event))
                if isinstance(event, h11.EndOfMessage):
                    break

    async def _send(self, remote: trio.SocketStream, data: bytes | None) -> None:
        await remote.send_all(data or b"")
        self._count("out", len(data or b""))

    async def _pump(self, source: trio.SocketStream, target: trio.SocketStream, way: str) -> None:
        """Bytes one way until their end, which is passed on; both ways silent ends it too."""
        while True:
            data = b""
            with trio.move_on_after(_IDLE_S) as scope:
                data = await source.receive_some(_READ_BYTES)
            if scope.cancelled_caught:
                if trio.current_time() - self._moved_at < _IDLE_S:
                    continue
                raise trio.TooSlowError
            if not data:
                await target.send_eof()
                return
            await target.send_all(data)
            self._count(way, len(data))

    def _count(self, way: str, size: int) -> None:
        self._moved_at = trio.current_time()
        if way == "in":
            self._proxy.bytes_in += size
        else:
            self._proxy.bytes_out += size


def _target(request: h11.Request) -> tuple[str, int]:
    """Host and port of a proxy request. Raises LumarisError `malformed`."""
    try:
        if request.method == b"CONNECT":
            url = urlsplit(b"//" + request.target)
        else:
            url = urlsplit(request.target)
            if url.scheme != b"http":
                raise ValueError("only http:// and CONNECT are served")
        host, port = url.hostname, url.port or (80 if url.scheme else None)
        if not host or not port or url.username is not None:
            raise ValueError("no host and port")
        return host.decode("ascii"), port
    except (ValueError, UnicodeError) as error:
        raise LumarisError("malformed", f"Not a request to a proxy: {error}.") from error
