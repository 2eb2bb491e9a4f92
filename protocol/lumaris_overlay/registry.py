"""Images from a registry, without an engine: github.com/opencontainers/distribution-spec.

A registry may be anyone's and a reference is a stranger's choice, so: names lead to addresses that
are looked up once and then connected to; none of this machine's networks is reached unless the
owner lists that registry; a redirect goes to its own host or by https; and every byte has a size
that was known before and a hash.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlencode

import httpx
import trio

from lumaris_overlay.image_archive import (
    CONFIG_BYTES_MAX,
    ImageConfig,
    bad_image,
    check_digest,
    choose_platform,
    parse_config,
    parse_json,
)
from lumaris_overlay.networks import is_public
from lumaris_overlay.resolver import Resolver
from lumaris_protocol import ids
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import IMAGE_BYTES_MAX, LAYERS_MAX, MIB

# Where a registry hands out its tokens and takes its questions, where that is not its own name.
_HUB = "docker.io"
_API_HOSTS: Final = {_HUB: "registry-1.docker.io"}
_TOKEN_HOSTS: Final = {_HUB: "auth.docker.io"}
# Large public registries; an owner's list in node.toml replaces them.
REGISTRIES_DEFAULT: Final = (_HUB, "ghcr.io", "mcr.microsoft.com", "public.ecr.aws", "quay.io")

_REFERENCE = re.compile(
    r"(?:(?P<host>localhost|[a-z0-9-]+(?:\.[a-z0-9-]+)+|[a-z0-9-]+(?=:[0-9]))(?P<port>:[0-9]{1,5})?/)?"
    r"(?P<name>[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?\Z"
)
_MANIFEST_BYTES_MAX = 4 * MIB  # the specification's own bound
_TOKEN_BYTES_MAX = 64 * 1024
_REDIRECTS_MAX = 5
_TRIES = 5  # in a row, without a byte of progress
_PAUSE_S = 0.5
_TIMEOUT = httpx.Timeout(10.0, read=30.0)
_WRITE_BYTES = 1 * MIB
_READ_BYTES = 64 * 1024
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        *_INDEXES,
    )
)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Reference:
    """Where an image is: a registry's name (and port), a repository, a tag or a manifest's hash."""

    host: str
    repository: str
    tag: str = "latest"
    digest: str = ""

    @property
    def source(self) -> str:
        """The reference by hash, as a work order names it."""
        return f"{self.host}/{self.repository}@{self.digest}"


@dataclass(frozen=True)
class Blob:
    """A part of an image: its hash and its size in bytes as it is stored."""

    digest: str
    size: int


@dataclass(frozen=True)
class FoundImage:
    """An image in a registry. `reference` names the manifest by hash, for this processor."""

    reference: Reference
    config: Blob
    raw_config: bytes
    layers: tuple[Blob, ...]

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        return self.config.size + sum(layer.size for layer in self.layers)


@dataclass(frozen=True)
class Policy:
    """Which registries are asked: those named, or any; `own` may be on this machine's networks."""

    hosts: frozenset[str] | None = frozenset(REGISTRIES_DEFAULT)
    own: frozenset[str] | None = frozenset()

    def check(self, host: str) -> None:
        """Raises LumarisError `image_refused`."""
        if self.hosts is not None and host not in self.hosts:
            raise LumarisError("image_refused", f"Images from {host} are not taken here.")

    def owns(self, host: str) -> bool:
        """Whether the registry may be at a private address."""
        return self.own is None or host in self.own


ANY_REGISTRY: Final = Policy(hosts=None, own=None)


def policy_of(registries: Iterable[str]) -> Policy:
    """The policy of an owner's list: what he names beside the public ones is his own."""
    hosts = frozenset(registries)
    return Policy(hosts=hosts, own=hosts - set(REGISTRIES_DEFAULT))


def parse_reference(text: str) -> Reference:
    """`[host[:port]/]name[:tag][@sha256:…]`. Raises LumarisError `bad_image`."""
    found = _REFERENCE.fullmatch(text) if len(text) <= 384 else None
    if found is None:
        raise LumarisError("bad_image", f"{text[:120]!r} is no name of an image in a registry.")
    host = (found["host"] or _HUB) + (found["port"] or "")
    name = found["name"]
    if host == _HUB and "/" not in name:
        name = f"library/{name}"
    return Reference(host, name, found["tag"] or "latest", found["digest"] or "")


class Registry:
    """A client of one registry for one repository; an async context manager."""

    def __init__(
        self,
        reference: Reference,
        policy: Policy = ANY_REGISTRY,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Raises LumarisError `image_refused`."""
        self._transport = transport
        policy.check(reference.host)
        self.reference = reference
        self._private = policy.owns(reference.host)
        api = _API_HOSTS.get(reference.host, reference.host)
        scheme = "http" if self._private and _is_loopback(api) else "https"
        self._base = httpx.URL(f"{scheme}://{api}/v2/{reference.repository}/")
        self._token = ""
        self._addresses: dict[tuple[str, str, int], str] = {}
        self._resolve = Resolver()
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Registry:
        context = await trio.to_thread.run_sync(_tls)
        # Proxies of the environment would choose the address in our place.
        self._client = httpx.AsyncClient(
            verify=context, trust_env=False, timeout=_TIMEOUT, transport=self._transport
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._client is not None
        await self._client.aclose()

    async def find(self) -> FoundImage:
        """The image for this processor, its manifest and configuration checked.

        Raises LumarisError `bad_image`, `image_refused`, `unreachable`.
        """
        named = self.reference.digest or self.reference.tag
        for _ in range(3):  # an index may name an index
            raw = await self._small(f"manifests/{named}", _MANIFEST_BYTES_MAX, accept=_ACCEPT)
            digest = ids.digest(raw)
            if named.startswith("sha256:") and named != digest:
                raise bad_image("has a manifest that does not match its hash")
            manifest = _object(parse_json(raw))
            if not isinstance(manifest.get("manifests"), list):
                return await self._found(digest, manifest)
            named = check_digest(choose_platform(manifest["manifests"]).get("digest"))
        raise bad_image("has too many indexes")

    async def download(
        self, blob: Blob, part: Path, *, progress: Progress = lambda _: None
    ) -> None:
        """Fetch a blob into `part`, from where an earlier attempt left it, and check its hash.

        `progress` gets the bytes that are there. Raises LumarisError `bad_image` (and removes the
        part), `unreachable`, `disk_short`.
        """
        tries = 0
        size, hasher = await trio.to_thread.run_sync(_resume, part, blob.size)
        while size < blob.size:
            before = size
            try:
                async with aclosing(self._pieces(blob, size)) as pieces:
                    async for at, piece in pieces:
                        if at != size:  # the registry begins again at the front
                            size, hasher = at, hashlib.sha256()
                        await trio.to_thread.run_sync(_write, part, piece, size)
                        hasher.update(piece)
                        size += len(piece)
                        progress(size)
            except httpx.TransportError:
                pass  # what came is kept, and the rest asked for again
            tries = 1 if size > before else tries + 1
            if size < blob.size and tries >= _TRIES:
                raise LumarisError("unreachable", f"{self.reference.host} broke off the image.")
            if size < blob.size:
                await trio.sleep(_PAUSE_S)
        if f"sha256:{hasher.hexdigest()}" != blob.digest:
            part.unlink(missing_ok=True)
            raise bad_image("has a part that does not match its hash")

    # --- what registries say ---

    async def _found(self, digest: str, manifest: dict[str, Any]) -> FoundImage:
        config = _descriptor(manifest.get("config"), CONFIG_BYTES_MAX)
        items = manifest.get("layers")
        if not isinstance(items, list) or not 1 <= len(items) <= LAYERS_MAX:
            raise bad_image(f"does not have 1 to {LAYERS_MAX} layers")
        layers = tuple(_descriptor(item, IMAGE_BYTES_MAX) for item in items)
        if sum(layer.size for layer in layers) > IMAGE_BYTES_MAX:
            raise bad_image(f"is larger than {IMAGE_BYTES_MAX} bytes")
        if any("zstd" in str(item.get("mediaType")) for item in items):
            raise bad_image("has layers compressed with zstd, which is not read here; use gzip")
        raw = await self._small(f"blobs/{config.digest}", config.size)
        if ids.digest(raw) != config.digest or len(raw) != config.size:
            raise bad_image("has a configuration that does not match its hash")
        parsed: ImageConfig = parse_config(raw)
        if len(parsed.diff_ids) != len(layers):
            raise bad_image("does not have the layers that its configuration names")
        at = Reference(
            self.reference.host, self.reference.repository, self.reference.tag, digest=digest
        )
        return FoundImage(at, config, raw, layers)

    async def _small(self, path: str, size_max: int, *, accept: str = "*/*") -> bytes:
        try:
            async with self._get(self._base.join(path), {"Accept": accept}) as answer:
                return await _body(answer, size_max)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    async def _pieces(self, blob: Blob, start: int) -> AsyncGenerator[tuple[int, bytes]]:
        """Where each piece of a blob begins, and the piece; never beyond the blob's size."""
        headers = {"Range": f"bytes={start}-{blob.size - 1}"} if start else {}
        async with self._get(self._base.join(f"blobs/{blob.digest}"), headers) as answer:
            at = start if answer.status_code == 206 else 0
            if start and at and not _begins_at(answer, start):
                raise bad_image("comes in other pieces than were asked for")
            async with _pieces_of(answer, _WRITE_BYTES) as pieces:
                async for piece in pieces:
                    if at + len(piece) > blob.size:
                        raise bad_image("has a part that is larger than it says")
                    yield at, piece
                    at += len(piece)

    # --- HTTP ---

    @asynccontextmanager
    async def _get(self, url: httpx.URL, headers: dict[str, str]) -> AsyncGenerator[httpx.Response]:
        """A good answer, after tokens and redirects."""
        asked_for_token = False
        for _ in range(_REDIRECTS_MAX + 2):
            own = self._is_own(url)
            extra = {"Authorization": f"Bearer {self._token}"} if own and self._token else {}
            async with self._send(url, {**headers, **extra}) as answer:
                if answer.status_code in (200, 206):
                    yield answer
                    return
                if answer.status_code == 401 and own and not asked_for_token:
                    challenge = answer.headers.get("www-authenticate", "")
                elif answer.is_redirect:
                    url = self._redirected(url, answer.headers.get("location", ""))
                    continue
                else:
                    raise self._refused(answer.status_code)
            self._token, asked_for_token = await self._ask_token(challenge), True
        raise LumarisError("unreachable", f"{self.reference.host} redirects without an end.")

    @asynccontextmanager
    async def _send(
        self, url: httpx.URL, headers: dict[str, str]
    ) -> AsyncGenerator[httpx.Response]:
        assert self._client is not None
        address = await self._address(url)
        pinned = url.copy_with(host=address)
        request = self._client.build_request(
            "GET",
            pinned,
            headers={
                **headers,
                "Host": url.netloc.decode(),
                "User-Agent": "lumaris",
                "Accept-Encoding": "identity",  # sizes and hashes are of the bytes as they are
            },
            extensions={"sni_hostname": url.host, "timeout": _TIMEOUT.as_dict()},
        )
        answer = await self._client.send(request, stream=True)
        try:
            yield answer
        finally:
            with trio.move_on_after(1) as scope:
                scope.shield = True
                await answer.aclose()

    async def _address(self, url: httpx.URL) -> str:
        """The address that a host's name stands for; the same one for this client's life.

        It is kept for each port: only the owner's own registry may be at a private address.
        """
        host, port = url.host, url.port or {"http": 80, "https": 443}[url.scheme]
        place = (url.scheme, host, port)
        if place in self._addresses:
            return self._addresses[place]
        try:
            addresses = await self._resolve(host, port)
        except OSError as error:
            raise self._unreachable(error) from None
        if not (self._private and self._is_own(url)) and not all(map(is_public, addresses)):
            raise LumarisError("image_refused", f"{host} is at an address of a private network.")
        self._addresses[place] = addresses[0]
        return addresses[0]

    def _is_own(self, url: httpx.URL) -> bool:
        return (url.scheme, url.netloc) == (self._base.scheme, self._base.netloc)

    def _redirected(self, url: httpx.URL, location: str) -> httpx.URL:
        try:
            target = url.join(location)
        except (httpx.InvalidURL, ValueError):
            raise self._unreachable("a redirect that leads nowhere") from None
        same = (target.scheme, target.netloc) == (url.scheme, url.netloc)
        if not location or not (same or target.scheme == "https") or target.userinfo:
            raise LumarisError(
                "image_refused", f"{self.reference.host} redirects to where nothing is fetched."
            )
        return target

    async def _ask_token(self, challenge: str) -> str:
        """An anonymous token for pulling, from the realm that the registry names."""
        kind, _, rest = challenge.partition(" ")
        fields = dict(re.findall(r'(\w+)="([^"]{0,512})"', rest[:2048]))
        try:
            realm = httpx.URL(fields.get("realm", ""))
        except (httpx.InvalidURL, ValueError):
            realm = httpx.URL("")
        hosts = (self._base.netloc.decode(), _TOKEN_HOSTS.get(self.reference.host))
        if kind.lower() != "bearer" or realm.netloc.decode() not in hosts:
            raise LumarisError("image_refused", f"{self.reference.host} wants a login.")
        if realm.scheme != self._base.scheme:
            raise LumarisError("image_refused", "The registry's tokens come by another way.")
        query = {"scope": f"repository:{self.reference.repository}:pull"}
        if "service" in fields:
            query["service"] = fields["service"]
        url = realm.copy_with(query=urlencode(query).encode())
        try:
            async with self._send(url, {"Accept": "application/json"}) as answer:
                if answer.status_code != 200:
                    raise self._refused(answer.status_code)
                found = _object(parse_json(await _body(answer, _TOKEN_BYTES_MAX)))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        token = found.get("token") or found.get("access_token")
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]{1,16384}", token):
            raise LumarisError("image_refused", f"{self.reference.host} gives no token.")
        return token

    def _refused(self, status: int) -> LumarisError:
        host, name = self.reference.host, self.reference.repository
        if status == 404:
            return LumarisError("bad_image", f"{host} has no such image: {name}.")
        if status in (401, 403):
            return LumarisError("image_refused", f"{host} does not give out {name} without login.")
        return LumarisError("unreachable", f"{host} answers with status {status}.")

    def _unreachable(self, error: object) -> LumarisError:
        return LumarisError("unreachable", f"{self.reference.host} cannot be reached: {error}.")


def _is_loopback(netloc: str) -> bool:
    host = netloc.rpartition(":")[0] or netloc
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return False


def _tls() -> ssl.SSLContext:
    """The usual authorities, and those that this machine's owner added."""
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context


@asynccontextmanager
async def _pieces_of(answer: httpx.Response, size: int) -> AsyncGenerator[AsyncIterator[bytes]]:
    """The bytes of an answer as they come.

    httpx reads through several generators, and one that is left half-way is closed by the garbage
    collector, which trio warns of; cancelling its next read unwinds them all in order.
    """
    pieces = answer.aiter_raw(size)
    try:
        yield pieces
    finally:
        with suppress(httpx.HTTPError), trio.CancelScope() as scope:
            scope.cancel()
            async for _ in pieces:
                pass


async def _body(answer: httpx.Response, size_max: int) -> bytes:
    found = bytearray()
    async with _pieces_of(answer, _READ_BYTES) as pieces:
        async for piece in pieces:
            found += piece
            if len(found) > size_max:
                raise bad_image("has a description that is too large")
    return bytes(found)


def _descriptor(found: object, size_max: int) -> Blob:
    item = _object(found)
    size = item.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= size_max:
        raise bad_image("has a part whose size is not accepted")
    return Blob(check_digest(item.get("digest")), size)


def _object(found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise bad_image("has a description that cannot be read")
    return found


def _begins_at(answer: httpx.Response, start: int) -> bool:
    return bool(re.match(rf"bytes {start}-", answer.headers.get("content-range", "")))


def _resume(part: Path, size_max: int) -> tuple[int, hashlib._Hash]:
    """What an earlier attempt left: its bytes, hashed; more than there can be is begun again."""
    hasher = hashlib.sha256()
    try:
        with part.open("rb") as file:
            hasher = hashlib.file_digest(file, "sha256")
            size = file.tell()
    except FileNotFoundError:
        return 0, hasher
    if size > size_max:
        part.unlink()
        return 0, hashlib.sha256()
    return size, hasher


def _write(part: Path, piece: bytes, at: int) -> None:
    try:
        with part.open("r+b" if at else "wb") as file:
            file.seek(at)
            file.write(piece)
    except OSError as error:
        raise LumarisError("disk_short", f"The image does not fit: {error.strerror}.") from None
