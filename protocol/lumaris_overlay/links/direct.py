"""TLS straight between two programs: the listener, and how it is dialled.

Who the other program is comes from the overlay: there both sides agreed on a certificate's hash
(the pin) and a one-time token. The dialler checks the pin before it says the token, so that a
stranger at the address learns nothing; a stranger who dials learns nothing but that TLS is spoken.
"""

from __future__ import annotations

import datetime as dt
import errno
import functools
import hashlib
import hmac
import ipaddress
import logging
import socket
import ssl
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from lumaris_overlay.links import wire
from lumaris_overlay.links.carrier import LOST, Carrier
from lumaris_overlay.links.tls import TlsStream
from lumaris_overlay.links.wire import Attach, Kind
from lumaris_overlay.tasks import StrangerLog
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris_overlay.bulk.gate import BulkGate

logger = logging.getLogger(__name__)
_strangers = StrangerLog(logger)

FIRST_LINK = b"\x01"
FIRST_BULK = b"\x02"
# From the first byte to the token; a slow line needs three round trips.
_HANDSHAKE_S = 5.0
_CONNECT_S = 3.0
# Connections that have not shown a token yet. Each costs a descriptor and a TLS state of ~50 kB.
_HALF_OPEN_MAX = 128
_HALF_OPEN_PER_IP_MAX = 32
_ACCEPT_PAUSE_S = 0.1
# The certificate is known by its hash only; its dates just have to include any skew of clocks.
_CERTIFICATE_DAYS = 3650

OnAttach = Callable[[Carrier, Attach], bool]


class PinMismatchError(trio.BrokenResourceError):
    """The listener showed another certificate than the overlay announced."""


class Listener:
    """The direct listener of a program. `run` serves it until cancelled."""

    def __init__(
        self,
        listener: trio.SocketListener,
        context: ssl.SSLContext,
        pin: str,
        on_attach: OnAttach,
        gate: BulkGate | None,
    ) -> None:
        self.pin, self.gate = pin, gate
        host, port = listener.socket.getsockname()[:2]
        self.ip, self.port = str(host), int(port)
        self.half_open: Counter[str] = Counter()
        self._listener, self._context = listener, context
        self._on_attach = on_attach

    @property
    def everywhere(self) -> bool:
        """Whether it listens at every address of this machine."""
        return ipaddress.ip_address(self.ip).is_unspecified

    async def run(self, nursery: trio.Nursery) -> None:
        """Accept connections until cancelled."""
        async with self._listener:
            while True:
                try:
                    stream = await self._listener.accept()
                except OSError as error:
                    # Out of file descriptors, most likely: let some close before going on.
                    logger.warning("direct accept error=%r", error)
                    await trio.sleep(_ACCEPT_PAUSE_S)
                    continue
                try:
                    ip = str(stream.socket.getpeername()[0])
                except OSError:
                    ip = ""
                if (
                    not ip
                    or self.half_open.total() >= _HALF_OPEN_MAX
                    or self.half_open[ip] >= _HALF_OPEN_PER_IP_MAX
                ):
                    stream.socket.close()
                    continue
                self.half_open[ip] += 1
                nursery.start_soon(self._answer, stream, ip)

    async def _answer(self, stream: trio.SocketStream, ip: str) -> None:
        sock, first = stream.socket, b""
        try:
            try:
                with trio.move_on_after(_HANDSHAKE_S):
                    first = await sock.recv(1)
                    if first == FIRST_LINK:
                        await self._answer_link(sock)
            finally:
                self.half_open[ip] -= 1
                if not self.half_open[ip]:
                    del self.half_open[ip]
            if first == FIRST_BULK and self.gate is not None:
                await self.gate.accept(sock, self._context)
        except (*LOST, LumarisError) as error:
            _strangers.note(ip, "direct", error)
        except Exception as error:
            logger.warning("direct peer=%s error=%.300r", ip, error)
        finally:
            sock.close()

    async def _answer_link(self, sock: trio.socket.SocketType) -> None:
        tls = TlsStream(_plain(sock), self._context, server_side=True)
        carrier, kept = Carrier(tls, direct=True), False
        try:
            await tls.do_handshake()
            attach = wire.decode_json(await carrier.frame(), Kind.ATTACH, Attach)
            kept = self._on_attach(carrier, attach)
            if not kept:
                await carrier.send(wire.encode(Kind.REFUSED))
        finally:
            if not kept:
                tls.close()


async def open_listener(
    ip: str, port: int, on_attach: OnAttach, gate: BulkGate | None = None
) -> Listener:
    """Listen at an address with a fresh certificate (port 0: any).

    Raises LumarisError `port_in_use` or `config_invalid`.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(ip).version == 6 else socket.AF_INET
    except ValueError:
        raise LumarisError("config_invalid", f"{ip!r} is not an IP address to listen at.") from None
    context, pin = await trio.to_thread.run_sync(_server_context)
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind((ip, port))
        sock.listen(_HALF_OPEN_MAX)
    except OSError as error:
        sock.close()
        code = "port_in_use" if error.errno == errno.EADDRINUSE else "config_invalid"
        raise LumarisError(code, f"Cannot listen at {ip} port {port}: {error.strerror}.") from None
    return Listener(trio.SocketListener(sock), context, pin, on_attach, gate)


async def dial(address: tuple[str, int], pin: str) -> Carrier:
    """A TLS connection to the program with this pin.

    Raises ConnectionRefusedError, another of `LOST`, or trio.TooSlowError.
    """
    ip, port = address
    with trio.fail_after(_CONNECT_S):
        family = socket.AF_INET6 if ipaddress.ip_address(ip).version == 6 else socket.AF_INET
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        with sock:  # it is empty once TLS has taken it over
            await sock.connect((ip, port))
            await sock.send(FIRST_LINK)
            tls = TlsStream(_plain(sock), client_context())
        try:
            await tls.do_handshake()
            if not hmac.compare_digest(pin_of(tls.certificate), pin):
                raise PinMismatchError("the peer's direct listener shows another certificate")
        except BaseException:
            tls.close()
            raise
    carrier = Carrier(tls, direct=True)
    carrier.address = address
    return carrier


def pin_of(certificate: bytes) -> str:
    """The pin of a certificate (DER)."""
    return hashlib.sha256(certificate).hexdigest()


@functools.cache
def client_context() -> ssl.SSLContext:
    """For dialling; the certificate is checked by its pin after the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def may_dial(ip: str) -> bool:
    """Whether an address that a peer names can be a program's at all."""
    try:
        found = ipaddress.ip_address(ip)
    except ValueError:
        return False
    # In IPv6 the reserved blocks include loopback.
    reserved = found.version == 4 and found.is_reserved
    return not (found.is_unspecified or found.is_multicast or reserved)


def _plain(sock: trio.socket.SocketType) -> socket.socket:
    return socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())


def _server_context() -> tuple[ssl.SSLContext, str]:
    """A context with a certificate that exists for this listener only, and its pin."""
    # Only programs that listen need it, and they have the extra that brings it.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lumaris")])
    now = dt.datetime.now(dt.UTC)
    lifetime = dt.timedelta(days=_CERTIFICATE_DAYS)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - lifetime)
        .not_valid_after(now + lifetime)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # resumption is the link's own; a ticket would only cost a write
    # OpenSSL takes keys from files only: one that nobody else can read, for a moment.
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
        file.flush()
        context.load_cert_chain(file.name)
    return context, pin_of(certificate.public_bytes(serialization.Encoding.DER))
