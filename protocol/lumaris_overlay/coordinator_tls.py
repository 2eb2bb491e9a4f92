"""TLS towards a coordinator: whom to trust, and a certificate of our own where it demands one.

A coordinator may be signed by an authority of its own, whose certificate is a file. With mutual TLS
it answers a stranger's first requests and no others until a connection shows a certificate. It
issues those for a day to who proves a peer's key, so one is got when it is first asked for, and
renewed at half its life.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, Protocol, TypeVar

import trio

from lumaris_overlay.private_files import write_private_file
from lumaris_protocol import codec, coordinator_api
from lumaris_protocol.coordinator_api import Request, TlsCertificate
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import TLS_CERTIFICATE_BYTES_MAX
from lumaris_protocol.messages.identity import TlsRequest

log = logging.getLogger(__name__)

T = TypeVar("T")

FILE_NAME: Final = "coordinator-tls.pem"
# OpenSSL skips what stands before the first block of a PEM file.
_TIMES: Final = re.compile(rb"issued_at=(\d{1,12}) expires_at=(\d{1,12})\n")


class Send(Protocol):
    """Sends a request over a connection that shows no certificate."""

    def __call__(self, request: Request[T], /) -> Awaitable[T]: ...


class CoordinatorTls:
    """The TLS of one coordinator's callers. With `key` and `file` it can show a certificate."""

    def __init__(
        self,
        url: str,
        *,
        ca_file: Path | None = None,
        key: KeyPair | None = None,
        file: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._url, self._ca_file = url, ca_file
        self._key, self._file, self._clock = key, file, clock
        self._times = _times_of(file) if file is not None else (0, 0)

    def context(self, *, shown: bool = True) -> ssl.SSLContext | None:
        """For connections; None for plain HTTP. `shown` is whether they show our certificate.

        Raises LumarisError `config_invalid` for a file of authorities that cannot be read.
        """
        if not self._url.startswith("https://"):
            return None
        try:
            context = ssl.create_default_context(cafile=self._ca_file)
        except (OSError, ssl.SSLError) as error:
            raise LumarisError("config_invalid", f"{self._ca_file}: {error}") from None
        if shown and self.is_valid:
            try:
                context.load_cert_chain(str(self._file))
            except (OSError, ssl.SSLError) as error:
                log.warning("certificate not shown: %s: %s", self._file, error)
                self._times = (0, 0)
        return context

    @property
    def is_valid(self) -> bool:
        """Whether we have a certificate that has not ended."""
        return self._clock() < self._times[1]

    @property
    def is_due(self) -> bool:
        """Whether the certificate that we have should be renewed; it may have ended."""
        issued_at, expires_at = self._times
        return expires_at > 0 and self._clock() >= (issued_at + expires_at) / 2

    async def enrol(self, send: Send) -> None:
        """Get a certificate. Raises LumarisError."""
        if self._key is None or self._file is None or not self._url.startswith("https://"):
            raise LumarisError("certificate_needed", f"{self._url} asks for a TLS certificate.")
        info = await send(coordinator_api.info())
        challenge = await send(coordinator_api.challenge(self._key.peer_id))
        private, csr = _make_request()
        now = int(self._clock())
        request = TlsRequest(
            peer=self._key.peer_id,
            coordinator=info.coordinator,
            challenge=challenge.challenge,
            csr=csr,
            issued_at=now,
        )
        signed = codec.sign(request, self._key, info.network)
        answer = await send(coordinator_api.tls_certificate(signed.data))
        await trio.to_thread.run_sync(self._keep, answer, private, now)

    def _keep(self, answer: TlsCertificate, private: bytes, now: int) -> None:
        assert self._file is not None
        chain = answer.certificate.encode()
        times = b"issued_at=%d expires_at=%d\n" % (now, answer.expires_at)
        if len(chain) > TLS_CERTIFICATE_BYTES_MAX or not _TIMES.fullmatch(times):
            raise LumarisError("malformed", "The coordinator's answer is no certificate.")
        try:
            write_private_file(self._file, times + private + chain)
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(str(self._file))
        except ssl.SSLError as error:
            self._file.unlink(missing_ok=True)
            raise LumarisError("malformed", f"The coordinator's certificate: {error}") from None
        except OSError as error:
            raise LumarisError("not_writable", f"{self._file}: {error.strerror}") from None
        self._times = (now, answer.expires_at)

    def explain(self, error: BaseException, *, cut_off: bool) -> LumarisError:
        """Why there was no answer, as a user reads it. `cut_off`: there was a connection, and it
        ended; `certificate_needed` when that may be due to the certificate that we showed."""
        why = ""
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                return self._untrusted(cause)
            if isinstance(cause, ssl.SSLError):
                why, cut_off = f" {cause.reason or 'TLS failed'}.", cut_off or _is_alert(cause)
        if cut_off and self._times[1] > 0:
            # A server ends a handshake with a certificate that it refuses, often without a word:
            # ours has ended by its clock, or its authority was made anew.
            return LumarisError("certificate_needed", f"{self._url} may have refused ours.")
        return LumarisError("coordinator_unreachable", f"No answer from {self._url}.{why}")

    def _untrusted(self, error: ssl.SSLCertVerificationError) -> LumarisError:
        why = error.verify_message or "it does not verify"
        if self._ca_file is not None:
            hint = f"The authorities trusted are those of {self._ca_file}; ask the operator."
        else:
            hint = ""
        return LumarisError(
            "certificate_untrusted", f"The certificate of {self._url}: {why}.", hint=hint
        )


def _make_request() -> tuple[bytes, bytes]:
    """(a new private key in PEM, a PKCS #10 request for it in DER).

    Raises LumarisError `missing_extra`.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ModuleNotFoundError:
        raise LumarisError(
            "missing_extra",
            "A certificate for this coordinator needs the package cryptography.",
            hint="Install it: pip install 'lumaris[p2p]'.",
        ) from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lumaris")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private, request.public_bytes(serialization.Encoding.DER)


def _times_of(file: Path) -> tuple[int, int]:
    """(issued at, expires at) of the certificate that was kept; zeros without one."""
    found = None
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if not os.fstat(opened.fileno()).st_mode & 0o077:
            found = _TIMES.match(opened.read(64))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _is_alert(error: ssl.SSLError) -> bool:
    """Whether the other side ended the handshake."""
    return "ALERT" in (error.reason or "")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
