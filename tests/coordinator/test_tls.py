"""TLS on a real socket: the server's certificate, and client certificates of our own authority."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lumaris_coordinator import Coordinator, Settings, create_app
from lumaris_coordinator.authority import Authority, peer_of
from lumaris_coordinator.bounds import SERVER_CERTIFICATE_LIFETIME_S
from lumaris_coordinator.identity.commands import create_operator
from lumaris_coordinator.server import Protocol, Server
from lumaris_coordinator.tls import server_tls
from lumaris_protocol import codec
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.identity import TlsRequest
from tests.coordinator.builders import NETWORK, Market, Party, registration
from tests.coordinator.conftest import open_market

Pem = tuple[Path, Path]


def save(folder: Path, name: str, key: Any, certificate: bytes) -> Pem:
    """(certificate file, key file)."""
    made = folder / f"{name}.pem", folder / f"{name}.key"
    made[0].write_bytes(certificate)
    made[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return made


def server_certificate(folder: Path) -> Pem:
    """A self-signed certificate for 127.0.0.1."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    return save(folder, "server", key, certificate.public_bytes(serialization.Encoding.PEM))


def csr(key: Any) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "anybody")])
    made = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.DER)


def tls_request(
    party: Party, coordinator: str, challenge: str, /, *, now: int, **changes: Any
) -> bytes:
    key = changes.pop("key", None) or ec.generate_private_key(ec.SECP256R1())
    fields = {
        "peer": party.peer,
        "coordinator": coordinator,
        "challenge": challenge,
        "csr": changes.pop("csr", None) or csr(key),
        "issued_at": now,
        **changes,
    }
    return codec.sign(TlsRequest(**fields), party.key, NETWORK).data


class Site:
    """A coordinator behind real TLS."""

    def __init__(self, coordinator: Coordinator, port: int, folder: Path) -> None:
        self.coordinator, self.folder = coordinator, folder
        self.url = f"https://127.0.0.1:{port}"

    def client(self, certificate: Pem | None = None, *, trusting: str = "server") -> Any:
        context = ssl.create_default_context(cafile=str(self.folder / f"{trusting}.pem"))
        if certificate is not None:
            context.load_cert_chain(*certificate)
        return httpx.AsyncClient(base_url=self.url, verify=context, trust_env=False)

    async def challenge(self, client: httpx.AsyncClient, party: Party) -> str:
        answer = await client.post("/v1/identity/challenge", json={"peer": party.peer})
        return str(answer.json()["challenge"])

    async def enrol(self, party: Party) -> Pem:
        """A client certificate, asked for over a connection without one."""
        key = ec.generate_private_key(ec.SECP256R1())
        async with self.client() as client:
            challenge = await self.challenge(client, party)
            body = tls_request(
                party, self.coordinator.peer_id, challenge, now=int(time.time()), key=key
            )
            answer = await client.post("/v1/identity/tls-certificate", content=body)
        assert answer.status_code == 200, answer.text
        return save(self.folder, party.name, key, answer.json()["certificate"].encode())

    async def register(self, client: httpx.AsyncClient, party: Party) -> str:
        challenge = await self.challenge(client, party)
        body = registration(party, self.coordinator.peer_id, challenge, now=int(time.time()))
        answer = await client.post("/v1/identity/register", content=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["token"])


@asynccontextmanager
async def site(folder: Path, *, mutual: bool) -> AsyncIterator[Site]:
    certificate, key = server_certificate(folder)
    settings = Settings(
        state=folder / "state", tls_cert=certificate, tls_key=key, mutual_tls=mutual
    )
    coordinator = Coordinator(settings)
    tls = server_tls(settings, lambda: coordinator.authority, now=int(time.time()))
    assert tls is not None
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(coordinator),
            http=Protocol,
            lifespan="off",
            log_config=None,
            **tls.options(),
        )
        server = Server(config, ready="ready")
        async with coordinator.running(), asyncio.timeout(20):
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.001)
            yield Site(coordinator, listener.getsockname()[1], folder)
            server.should_exit = True
            await serving


@pytest.mark.slow
def test_tls_without_client_certificates(tmp_path: Path) -> None:
    async def talk() -> None:
        async with site(tmp_path, mutual=False) as found:
            async with found.client() as client:
                token = await found.register(client, Party("ann"))
                headers = {"authorization": f"Bearer {token}"}
                answer = await client.get("/v1/accounts/me", headers=headers)
                assert answer.status_code == 200
            other = tmp_path / "other"
            other.mkdir()
            server_certificate(other)
            (tmp_path / "foreign.pem").write_bytes((other / "server.pem").read_bytes())
            async with found.client(trusting="foreign") as client:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await client.get("/v1/info")

    asyncio.run(talk())


@pytest.mark.slow
def test_mutual_tls_binds_the_token_to_the_certificate(tmp_path: Path) -> None:
    async def talk() -> None:
        async with site(tmp_path, mutual=True) as found:
            ann, ben = Party("ann"), Party("ben")
            async with found.client() as client:
                assert (await client.get("/v1/info")).status_code == 200
                closed = await client.get("/v1/bootstrap")
                assert (closed.status_code, closed.json()["code"]) == (401, "certificate_needed")
                assert "coordinator-tls.pem" in closed.json()["hint"]
                assert (await client.get("/metrics")).status_code == 200  # as its setting says
            ann_pem, ben_pem = await found.enrol(ann), await found.enrol(ben)
            async with found.client(ann_pem) as client:
                token = await found.register(client, ann)
                headers = {"authorization": f"Bearer {token}"}
                assert (await client.get("/v1/accounts/me", headers=headers)).status_code == 200
            async with found.client(ben_pem) as client:
                stolen = await client.get("/v1/accounts/me", headers=headers)
                assert (stolen.status_code, stolen.json()["code"]) == (401, "unauthorized")
                # An API key goes with the certificate of any peer, and not without one.
                made = create_operator(found.coordinator.settings, "ada")
                headers = {"authorization": f"Bearer {made['key']}"}
                assert (await client.get("/v1/api-keys", headers=headers)).status_code == 200
            async with found.client() as client:
                bare = await client.get("/v1/api-keys", headers=headers)
                assert bare.json()["code"] == "certificate_needed"
            await refused(found, foreign(found, tmp_path))
            await refused(found, outdated(found, tmp_path))

    asyncio.run(talk())


@pytest.mark.slow
def test_who_does_not_shake_hands_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lumaris_coordinator.server.TLS_HANDSHAKE_S_MAX", 0.01)

    async def talk() -> None:
        async with site(tmp_path, mutual=False) as found:
            port = int(found.url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b""  # it ends, though we say nothing
            writer.close()

    asyncio.run(talk())


def foreign(found: Site, folder: Path) -> Pem:
    """A certificate of another authority, in the name of the same peer."""
    (folder / "elsewhere").mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    other = Authority(folder / "elsewhere", now=int(time.time()))
    made = other.issue(csr(key), peer=Party("ann").peer, now=int(time.time()))
    return save(folder, "elsewhere", key, made)


def outdated(found: Site, folder: Path) -> Pem:
    """A certificate of the right authority that ended an hour ago."""
    key = ec.generate_private_key(ec.SECP256R1())
    then = int(time.time()) - 25 * 3600
    made = found.coordinator.authority.issue(csr(key), peer=Party("ann").peer, now=then)
    return save(folder, "outdated", key, made)


async def refused(found: Site, certificate: Pem) -> None:
    async with found.client(certificate) as client:
        # TLS 1.3 tells a client that its certificate was refused only when it reads.
        with pytest.raises(httpx.TransportError):
            await client.get("/v1/info")


async def test_certificates_are_for_who_proved_the_key(tmp_path: Path) -> None:
    async with open_market(tmp_path / "state") as market:
        ann, ben = Party("ann"), Party("ben")

        async def ask(**changes: Any) -> httpx.Response:
            party = changes.pop("party", ann)
            challenge = changes.pop("challenge", None) or await market.challenge(ann)
            body = tls_request(party, market.peer, challenge, now=market.now, **changes)
            return await market.client.post("/v1/identity/tls-certificate", content=body)

        answer = await ask()
        made = x509.load_pem_x509_certificate(answer.json()["certificate"].encode())
        names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        assert uris == [f"lumaris:{ann.peer}"]
        assert int(made.not_valid_after_utc.timestamp()) == market.now + 24 * 3600
        made.verify_directly_issued_by(x509.load_pem_x509_certificate(answer.json()["ca"].encode()))
        weak = csr(rsa.generate_private_key(65_537, 1_024))
        for changes, code in (
            ({"party": ben, "peer": ann.peer}, "wrong_signer"),
            ({"party": ben}, "unauthorized"),
            ({"coordinator": ben.peer}, "wrong_domain"),
            ({"issued_at": market.now - 500}, "expired"),
            ({"csr": b"no request"}, "malformed"),
            ({"csr": weak}, "malformed"),
            ({"csr": broken(csr(ec.generate_private_key(ec.SECP256R1())))}, "malformed"),
        ):
            assert (await ask(**changes)).json()["code"] == code, changes
        challenge = await market.challenge(ann)
        codes = [(await ask(challenge=challenge)).status_code for _ in range(2)]
        assert codes == [200, 409]


def broken(request: bytes) -> bytes:
    """The same request with a changed signature."""
    return request[:-1] + bytes([request[-1] ^ 1])


def test_its_own_certificate_names_the_host_and_is_made_anew(tmp_path: Path) -> None:
    names = ("127.0.0.1", "::1", "market.example")
    settings = Settings(state=tmp_path, tls_names=names)
    authority, now = Authority(tmp_path, now=int(time.time())), int(time.time())
    tls = server_tls(settings, lambda: authority, now=now)
    assert tls is not None
    file = tls.options()["ssl_certfile"]
    assert file.stat().st_mode & 0o077 == 0
    made = x509.load_pem_x509_certificate(file.read_bytes())
    made.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.pem))
    found = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == ["market.example"]
    assert list(map(str, found.get_values_for_type(x509.IPAddress))) == list(names[:2])
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]  # no peer's certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert not tls.refresh(context, now=now + SERVER_CERTIFICATE_LIFETIME_S // 2 - 1)
    assert tls.refresh(context, now=now + SERVER_CERTIFICATE_LIFETIME_S // 2)
    assert x509.load_pem_x509_certificate(file.read_bytes()) != made


def test_a_certificate_that_was_replaced_is_served(tmp_path: Path) -> None:
    certificate, key = server_certificate(tmp_path)
    settings = Settings(state=tmp_path / "state", tls_cert=certificate, tls_key=key)
    tls = server_tls(settings, lambda: Authority(tmp_path, now=0), now=0)
    assert tls is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert not tls.refresh(context, now=0)
    whole = key.read_bytes()
    key.write_bytes(whole[:-40])  # half of it is there
    assert not tls.refresh(context, now=0)
    key.unlink()
    assert not tls.refresh(context, now=0)
    server_certificate(tmp_path)
    assert tls.refresh(context, now=0)


def test_the_authority_keeps_its_key(tmp_path: Path) -> None:
    first = Authority(tmp_path, now=int(time.time()))
    assert Authority(tmp_path, now=int(time.time())).pem == first.pem
    bundle = tmp_path / "tls" / "authority.pem"
    assert bundle.stat().st_mode & 0o077 == 0
    assert b"PRIVATE" not in first.ca_file.read_bytes()
    bundle.chmod(0o644)
    with pytest.raises(LumarisError, match="unsafe_key_file"):
        Authority(tmp_path, now=0)


@pytest.mark.parametrize(
    "certificate",
    [
        None,
        {},
        {"subjectAltName": (("DNS", "lumaris:x"),)},
        {"subjectAltName": (("URI", "other:x"),)},
        {"subjectAltName": (("URI", "lumaris:x"), ("URI", "lumaris:y"))},
    ],
)
def test_a_certificate_names_one_peer_or_none(certificate: object) -> None:
    assert peer_of(certificate) == ""


def test_the_settings_go_together(tmp_path: Path) -> None:
    both = {"tls_cert": tmp_path, "tls_key": tmp_path, "tls_names": ("a.example",)}
    for wrong in (
        {"tls_cert": tmp_path},
        {"tls_key": tmp_path},
        {"mutual_tls": True},
        both,
        {"tls_names": ("https://a.example",)},
        {"tls_names": ("A.example",)},
        {"tls_names": ("-a.example",)},
        {"tls_names": ("a.example",) * 17},
    ):
        with pytest.raises(LumarisError, match="config_invalid"):
            Settings(state=tmp_path, **wrong)
    bad = Settings(state=tmp_path, tls_cert=tmp_path / "none", tls_key=tmp_path / "none")
    with pytest.raises(LumarisError, match="config_invalid"):
        server_tls(bad, lambda: Authority(tmp_path, now=0), now=0)


async def test_a_revoked_peer_gets_none(tmp_path: Path) -> None:
    async with open_market(tmp_path / "state") as market:
        ann = await market.party("ann")
        await revoke(market, ann)
        body = tls_request(ann, market.peer, await market.challenge(ann), now=market.now)
        answer = await market.client.post("/v1/identity/tls-certificate", content=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "revoked")


async def revoke(market: Market, party: Party) -> None:
    held = market.coordinator.revocations
    await market.coordinator.store.submit(
        lambda connection: held.revoke(connection, [(party.peer, 0)], reason="test")
    )
