"""The registry client, against a real registry and against ones that lie."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from lumaris_node.images.archive import build_archive
from lumaris_overlay import registry as registries
from lumaris_overlay.image_archive import architecture
from lumaris_overlay.networks import is_public
from lumaris_overlay.registry import (
    ANY_REGISTRY,
    Blob,
    Policy,
    Reference,
    Registry,
    parse_reference,
)
from lumaris_overlay.resolver import Resolver
from lumaris_protocol import ids
from lumaris_protocol.errors import LumarisError
from tests.overlay.registries import Pusher, run_registry

CONFIG = json.dumps(
    {"architecture": architecture(), "os": "linux", "rootfs": {"diff_ids": [ids.digest(b"layer")]}}
).encode()
HOST = "registry.test"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("busybox", ("docker.io", "library/busybox", "latest", "")),
        ("python:3.12", ("docker.io", "library/python", "3.12", "")),
        ("me/app", ("docker.io", "me/app", "latest", "")),
        ("ghcr.io/a/b/c:v1", ("ghcr.io", "a/b/c", "v1", "")),
        ("localhost:5000/x", ("localhost:5000", "x", "latest", "")),
        (f"quay.io/a/b@{ids.digest(b'')}", ("quay.io", "a/b", "latest", ids.digest(b""))),
    ],
)
def test_references(text: str, expected: tuple[str, ...]) -> None:
    found = parse_reference(text)
    assert (found.host, found.repository, found.tag, found.digest) == expected


@pytest.mark.parametrize(
    "text",
    ["", "A/b", "../x", "a/../b", "http://a/b", "a b", "a@sha256:12", "x" * 500, "u:p@h/x", "a\n"],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(LumarisError, match="no name of an image"):
        parse_reference(text)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:0a00:0001::", False),
        ("168.63.129.16", False),
        ("192.0.0.192", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::a9fe:a9fe", False),
        ("::7f00:1", False),
        ("fec0::1", False),
        ("3fff::1", False),
        ("nonsense", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


# --- a real one ---


@pytest.mark.slow
async def test_an_image_comes_from_a_registry(registry_program: str, tmp_path: Path) -> None:
    layers = []
    for number in range(2):
        layers.append(tmp_path / f"layer{number}")
        layers[-1].write_bytes(random.Random(number).randbytes(3_000_000))
    image = build_archive(
        tmp_path / "image.tar", {"architecture": architecture(), "os": "linux"}, layers
    )
    with run_registry(registry_program, tmp_path / "registry") as host:
        pusher = Pusher(host, "team/app")
        source = pusher.image(tmp_path / "image.tar", "v1")
        pusher.close()
        async with Registry(parse_reference(f"{host}/team/app:v1")) as client:
            found = await client.find()
            assert found.config.digest == image
            assert found.reference.source == source
            for number, layer in enumerate(found.layers):
                seen: list[int] = []
                part = tmp_path / f"part{number}"
                await client.download(layer, part, progress=seen.append)
                assert ids.digest(part.read_bytes()) == layer.digest
                assert seen[-1] == layer.size and seen == sorted(seen)
            half = (tmp_path / "part0").read_bytes()[:1_000_000]
            (tmp_path / "part0").write_bytes(half)
            seen = []
            await client.download(found.layers[0], tmp_path / "part0", progress=seen.append)
            assert seen[0] > 1_000_000
            (tmp_path / "part0").write_bytes(b"x" + half[1:])
            with pytest.raises(LumarisError, match="does not match its hash"):
                await client.download(found.layers[0], tmp_path / "part0")
            assert not (tmp_path / "part0").exists()
            with pytest.raises(LumarisError, match="larger than it says"):
                await client.download(Blob(found.layers[0].digest, 2_000_000), tmp_path / "part0")
        async with Registry(parse_reference(f"{host}/team/none")) as client:
            with pytest.raises(LumarisError, match="no such image"):
                await client.find()
        async with Registry(parse_reference(source)) as client:
            assert (await client.find()).config.digest == image


# --- ones that lie ---

Answer = Callable[[httpx.Request], httpx.Response]


class _Bytes(httpx.AsyncByteStream):
    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._data


def raw(status: int, data: bytes) -> httpx.Response:
    """An answer whose bytes arrive, as those of a network do."""
    return httpx.Response(status, stream=_Bytes(data))


def answering(answer: Answer, policy: Policy = ANY_REGISTRY, *, digest: str = "") -> Registry:
    found = Registry(
        Reference(HOST, "a/b", digest=digest), policy, transport=httpx.MockTransport(answer)
    )
    hosts = {HOST: "192.0.2.1", "cdn.test": "192.0.2.2", "auth.test": "192.0.2.3"}
    found._addresses = {("https", host, 443): address for host, address in hosts.items()}
    return found


def manifest(**changes: object) -> dict[str, object]:
    return {
        "config": {"digest": ids.digest(CONFIG), "size": len(CONFIG)},
        "layers": [{"digest": ids.digest(b"zipped"), "size": 6}],
        **changes,
    }


def serving(content: object, blobs: bytes = CONFIG) -> Answer:
    def answer(request: httpx.Request) -> httpx.Response:
        if "/manifests/" in request.url.path:
            return raw(200, json.dumps(content).encode())
        return raw(200, blobs)

    return answer


async def refusal(client: Registry) -> str:
    async with client:
        with pytest.raises(LumarisError) as caught:
            await client.find()
    return caught.value.code


async def test_an_honest_mock_is_understood() -> None:
    async with answering(serving(manifest())) as client:
        found = await client.find()
    assert found.layers == (Blob(ids.digest(b"zipped"), 6),)
    assert found.size == 6 + len(CONFIG)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        "text",
        {"manifests": []},
        {"manifests": [{"digest": "sha256:1", "platform": {}}]},
        {"manifests": [{"digest": ids.digest(b"x")}]},  # an index that names an index, for ever
        {"manifests": [{"digest": ids.digest(b""), "platform": {"os": "plan9"}}]},
        manifest(config={"digest": ids.digest(CONFIG), "size": len(CONFIG) - 1}),
        manifest(config={"digest": ids.digest(b"other"), "size": len(CONFIG)}),
        manifest(config={"digest": "md5:1", "size": 1}),
        manifest(config={"digest": ids.digest(CONFIG), "size": 1 << 40}),
        manifest(layers=[]),
        manifest(layers=[{"digest": ids.digest(b""), "size": -1}]),
        manifest(layers=[{"digest": ids.digest(b""), "size": True}]),
        manifest(layers=[{"digest": ids.digest(b""), "size": 1 << 60}]),
        manifest(layers=[{"digest": ids.digest(b""), "size": 1}] * 2),
        manifest(layers=[{"digest": ids.digest(b""), "size": 1}] * 1000),
        manifest(layers=[{"digest": ids.digest(b""), "size": 1, "mediaType": "x.tar+zstd"}]),
    ],
)
async def test_manifests_that_lie(content: object) -> None:
    assert await refusal(answering(serving(content))) == "bad_image"


async def test_a_manifest_asked_for_by_hash_has_that_hash() -> None:
    client = answering(serving(manifest()), digest=ids.digest(b"another"))
    assert await refusal(client) == "bad_image"


async def test_answers_without_an_end_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "_MANIFEST_BYTES_MAX", 1000)
    assert await refusal(answering(lambda _: raw(200, b" " * 2000))) == "bad_image"


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://cdn.test/x", "image_refused"),
        ("https://user:secret@cdn.test/x", "image_refused"),
        ("file:///etc/passwd", "image_refused"),
        ("", "image_refused"),
        ("https://registry.test/v2/again", "unreachable"),  # for ever
        ("https://metadata.test/latest", "image_refused"),
    ],
)
async def test_redirects_that_are_not_followed(
    location: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_up(_: Resolver, host: str, port: int) -> list[str]:
        return ["169.254.169.254"]

    monkeypatch.setattr(Resolver, "__call__", look_up)
    client = answering(lambda _: httpx.Response(307, headers={"location": location}))
    assert await refusal(client) == code


async def test_a_redirect_gets_no_token() -> None:
    seen: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        host, word = request.headers["host"], request.headers.get("authorization", "")
        seen.append((host, word))
        if host == "cdn.test":
            return raw(200, CONFIG)
        if request.url.path == "/token":
            assert request.url.params["scope"] == "repository:a/b:pull"
            return raw(200, b'{"token": "t0ken"}')
        if not word:
            realm = f'Bearer realm="https://{HOST}/token",service="s"'
            return httpx.Response(401, headers={"www-authenticate": realm})
        if "/blobs/" in request.url.path:
            return httpx.Response(307, headers={"location": "https://cdn.test/blob"})
        return raw(200, json.dumps(manifest()).encode())

    async with answering(answer) as client:
        await client.find()
    assert ("cdn.test", "") in seen
    assert (HOST, "Bearer t0ken") in seen
    assert all(not word for host, word in seen if host != HOST)


@pytest.mark.parametrize(
    "challenge",
    [
        'Bearer realm="https://auth.test/token"',
        f'Bearer realm="http://{HOST}/token"',
        'Bearer realm="not a url\\u0000"',
        'Basic realm="x"',
        "",
        f'Bearer realm="https://{HOST}/token"',  # whose token is no token
    ],
)
async def test_logins_that_are_not_made(challenge: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/token":
            return raw(200, b'{"token": "a\\r\\nX-Evil: 1"}')
        return httpx.Response(401, headers={"www-authenticate": challenge})

    assert await refusal(answering(answer)) == "image_refused"


async def test_the_owner_says_which_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LumarisError, match="are not taken"):
        Registry(Reference("evil.test", "a"), Policy())

    async def look_up(_: Resolver, host: str, port: int) -> list[str]:
        return ["8.8.8.8", "10.0.0.1"]

    monkeypatch.setattr(Resolver, "__call__", look_up)
    policy = Policy(hosts=frozenset({HOST}))
    client = Registry(
        Reference(HOST, "a"), policy, transport=httpx.MockTransport(serving(manifest()))
    )
    assert await refusal(client) == "image_refused"
    own = Policy(hosts=frozenset({HOST}), own=frozenset({HOST}))
    async with Registry(
        Reference(HOST, "a"), own, transport=httpx.MockTransport(serving(manifest()))
    ) as client:
        await client.find()


async def test_what_is_allowed_for_one_port_is_not_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def look_up(_: Resolver, host: str, port: int) -> list[str]:
        return ["10.0.0.1"]

    monkeypatch.setattr(Resolver, "__call__", look_up)

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(307, headers={"location": f"https://{HOST}:8443/x"})

    own = Policy(hosts=frozenset({HOST}), own=frozenset({HOST}))
    client = Registry(Reference(HOST, "a"), own, transport=httpx.MockTransport(answer))
    assert await refusal(client) == "image_refused"


async def test_a_blob_is_never_more_than_it_says(tmp_path: Path) -> None:
    part = tmp_path / "part"
    async with answering(lambda _: raw(200, b"12345678")) as client:
        with pytest.raises(LumarisError, match="larger than it says"):
            await client.download(Blob(ids.digest(b"1234"), 4), part)


async def test_a_blob_that_always_breaks_off_is_given_up(
    tmp_path: Path, autojump_clock: object
) -> None:
    part, asked = tmp_path / "part", []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("range"))
        return raw(206 if len(asked) > 1 else 200, b"")

    async with answering(answer) as client:
        with pytest.raises(LumarisError) as caught:
            await client.download(Blob(ids.digest(b"1234"), 4), part)
    assert caught.value.code == "unreachable" and len(asked) == 5


async def test_a_registry_without_ranges_begins_again(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(b"12")
    async with answering(lambda _: raw(200, b"1234")) as client:
        await client.download(Blob(ids.digest(b"1234"), 4), part)
    assert part.read_bytes() == b"1234"
