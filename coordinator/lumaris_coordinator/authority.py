"""The coordinator's own certificate authority: client certificates for peers that proved their key,
and the server's own where the settings ask for it.

A client's certificate names a peer in one URI (`lumaris:<peer id>`) and lives a day, so none is
ever revoked: a revoked peer gets no other. The authority's key is private to the state and signs
nothing else. Neither kind of certificate can be used as the other.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lumaris_coordinator.bounds import (
    AUTHORITY_LIFETIME_S,
    CERTIFICATE_LIFETIME_S,
    RSA_BITS_MAX,
    RSA_BITS_MIN,
    SERVER_CERTIFICATE_LIFETIME_S,
)
from lumaris_overlay.private_files import make_private_folder, write_private_file
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import CLOCK_SKEW_S

URI_SCHEME: Final = "lumaris:"
FOLDER: Final = "tls"
_BUNDLE: Final = "authority.pem"
CA_FILE: Final = "ca.pem"


class Authority:
    """The authority in a state directory; made there when there is none.

    Raises LumarisError `not_writable` or `config_invalid`.
    """

    def __init__(self, state: Path, *, now: int) -> None:
        folder = state / FOLDER
        make_private_folder(folder)
        bundle = folder / _BUNDLE
        try:
            if not bundle.exists():
                # Key and certificate in one file: a crash cannot leave one without the other.
                write_private_file(bundle, _new_authority(now))
            if bundle.stat().st_mode & 0o077:
                raise LumarisError("unsafe_key_file", f"{bundle} can be read by other users.")
            data = bundle.read_bytes()
            key = serialization.load_pem_private_key(data, None)
            self._certificate = x509.load_pem_x509_certificate(data)
            self.ca_file = folder / CA_FILE
            if not self.ca_file.exists() or self.ca_file.read_bytes() != self.pem:
                write_private_file(self.ca_file, self.pem)
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise LumarisError("config_invalid", f"{bundle}: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise LumarisError("config_invalid", f"{bundle} holds another kind of key.")
        self._key = key

    @property
    def pem(self) -> bytes:
        """The authority's own certificate, for everybody."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def serve(self, names: tuple[str, ...], *, now: int) -> bytes:
        """A new key and the server's certificate for it, in PEM, under names and IP addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._leaf(key.public_key(), names[0], now, SERVER_CERTIFICATE_LIFETIME_S)
        certificate = (
            builder.add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]),
                critical=False,
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return _private_pem(key) + certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, csr: bytes, *, peer: str, now: int) -> bytes:
        """A client certificate in PEM for the key of a PKCS #10 request, in the name of a peer.

        Raises LumarisError `malformed` for a request that does not hold or a key we do not take.
        """
        certificate = (
            self._leaf(_key_of(csr), peer, now, CERTIFICATE_LIFETIME_S)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(URI_SCHEME + peer)]),
                critical=False,
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def _leaf(
        self, key: CertificatePublicKeyTypes, name: str, now: int, lifetime_s: int
    ) -> x509.CertificateBuilder:
        # A common name has 64 characters at most; nobody decides by it.
        common = x509.NameAttribute(NameOID.COMMON_NAME, name[:64])
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([common]))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_time(now - CLOCK_SKEW_S))
            .not_valid_after(_time(now + lifetime_s))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )


def peer_of(certificate: object) -> str:
    """The peer that a verified client certificate names (`ssl.SSLObject.getpeercert`); "" without
    a certificate or such a name."""
    names = certificate.get("subjectAltName", ()) if isinstance(certificate, dict) else ()
    found = [text for kind, text in names if kind == "URI" and text.startswith(URI_SCHEME)]
    return found[0].removeprefix(URI_SCHEME) if len(found) == 1 else ""


def _key_of(csr: bytes) -> CertificatePublicKeyTypes:
    try:
        request = x509.load_der_x509_csr(csr)
        public = request.public_key()
        taken = (
            (isinstance(public, ec.EllipticCurvePublicKey) and public.curve.key_size >= 256)
            or isinstance(public, ed25519.Ed25519PublicKey)
            or (
                isinstance(public, rsa.RSAPublicKey)
                and RSA_BITS_MIN <= public.key_size <= RSA_BITS_MAX
            )
        )
        if taken and request.is_signature_valid:
            return public
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        pass
    raise LumarisError("malformed", "The certificate request does not hold, or its key is weak.")


def _new_authority(now: int) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    label = f"Lumaris coordinator {os.urandom(4).hex()}"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, label)])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now - CLOCK_SKEW_S))
        .not_valid_after(_time(now + AUTHORITY_LIFETIME_S))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _private_pem(key) + certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _time(seconds: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
