"""The coordinator's answers, true and hostile, read without a socket."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lumaris_protocol import coordinator_api as api
from lumaris_protocol import receipts
from lumaris_protocol.errors import LumarisError
from tests.protocol import parties as p

RECORDS: list[tuple[api.Request[Any], msgspec.Struct]] = [
    (
        api.info(),
        api.Info(
            network="testnet",
            coordinator=p.COORDINATOR.peer_id,
            currency="TEST",
            fee_bps=250,
            settle_window_s=60,
            test_credit_nanos=1,
            version="0.1.0",
            time=p.NOW,
        ),
    ),
    (api.bootstrap(), api.Bootstrap(addresses=["/ip4/127.0.0.1/tcp/1"])),
    (api.challenge(p.BUYER.peer_id), api.Challenge(challenge="00", expires_at=p.NOW)),
    (
        api.register(b"signed"),
        api.Membership(certificate=b"c", account="a", token="t", expires_at=p.NOW),
    ),
    (
        api.credit(b"signed"),
        api.Credit(account="a", currency="TEST", credited_nanos=1, transaction=2),
    ),
    (
        api.account("token"),
        api.Account(account="a", peer="p", currency="TEST", free_nanos=1, held_nanos=2),
    ),
    (api.audit(), api.Audit(balanced=True, accounts=1, transfers=2, sum_nanos=0)),
]


def code_of(request: api.Request[Any], status: int, body: bytes) -> LumarisError:
    with pytest.raises(LumarisError) as caught:
        request.read(status, body)
    return caught.value


@pytest.mark.parametrize(("request_", "record"), RECORDS, ids=lambda x: getattr(x, "path", ""))
def test_a_record_is_read(request_: api.Request[Any], record: msgspec.Struct) -> None:
    assert request_.read(200, msgspec.json.encode(record)) == record
    for junk in (b"", b"<html>", b"[]", b"{}", b"\xff", b"[" * 100_000):
        assert code_of(request_, 200, junk).code == "malformed"


def test_signed_documents_travel_as_bytes() -> None:
    for request in (api.register(b"x"), api.credit(b"x"), api.grant(b"x"), api.settle(b"x")):
        assert (request.method, request.body) == ("POST", b"x")
        assert request.headers == {"content-type": api.ENVELOPE_MEDIA_TYPE}
    assert api.grant(b"x").read(201, b"grant") == b"grant"


def test_only_named_callers_carry_a_token() -> None:
    assert api.account("secret").headers == {"authorization": "Bearer secret"}
    found = api.receipt("rcp_x", "secret")
    assert found.path == "/v1/receipts/rcp_x"
    assert found.headers == {"authorization": "Bearer secret"}
    assert found.read(200, b"file") == b"file"
    assert api.info().headers == {}


def test_a_claim_is_settled_or_waits() -> None:
    claim = api.settle(b"signed")
    file = receipts.encode_bundle(p.settled().bundle)
    assert claim.read(200, file) == file
    assert claim.read(202, b'{"state":"claimed","settle_by":5}') == api.Claimed("claimed", 5)
    assert code_of(claim, 200, b"no receipt").code == "malformed"


def test_a_problem_is_the_coordinators_error() -> None:
    body = b'{"code":"no_funds","detail":"Two short.","hint":"Deposit.","money_moved":true}'
    error = code_of(api.info(), 402, body)
    assert (error.code, error.message, error.hint, error.money_moved) == (
        "no_funds",
        "Two short.",
        "Deposit.",
        True,
    )


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>502</html>", b'{"code":"made_up"}', b"{}", b'{"code":1}', b"[" * 100_000],
)
def test_a_problem_of_someone_else_is_unreachable(body: bytes) -> None:
    error = code_of(api.info(), 502, body)
    assert error.code == "coordinator_unreachable"
    assert "502" in error.message


def test_an_endless_answer_is_refused() -> None:
    assert code_of(api.info(), 200, b" " * (api.ANSWER_BYTES_MAX + 1)).code == "oversize"
