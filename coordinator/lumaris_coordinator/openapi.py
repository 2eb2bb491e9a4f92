"""The OpenAPI 3.1 document: what the routes say of themselves, completed from one table.

The table names for each route what it answers. A route that is missing from it is an error when
the document is made, so none goes undescribed; the tests hold every answer that they get to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from lumaris_coordinator import answers as a
from lumaris_coordinator.http import OCTETS, SECURITY_SCHEMES
from lumaris_coordinator.problems import MEDIA_TYPE
from lumaris_protocol.limits import IDEMPOTENCY_KEY_CHARS_MAX

JSON: Final = "application/json"
TEXT: Final = "text/plain; charset=utf-8"
PROMETHEUS: Final = "text/plain; version=0.0.4; charset=utf-8"
SSE: Final = "text/event-stream; charset=utf-8"


@dataclass(frozen=True)
class Told:
    """An answer: its status, and a record or a media type; `media` None has no body."""

    status: int
    shape: type | None = None
    media: str | None = JSON


def _json(shape: type, status: int = 200) -> tuple[Told, ...]:
    return (Told(status, shape),)


_NONE: Final = (Told(204, media=None),)
_OCTETS: Final = (Told(200, media=OCTETS),)
_FILE: Final = (Told(200),)  # a document of its own format, which docs/protocol.md describes

ANSWERS: Final[dict[str, tuple[Told, ...]]] = {
    "GET /.well-known/lumaris-keys": _OCTETS,
    "GET /healthz": _json(a.Alive),
    "GET /log/checkpoint": (Told(200, media=TEXT),),
    "GET /log/consistency": _json(a.Consistency),
    "GET /log/tile/{name}": _OCTETS,
    "GET /metrics": (Told(200, media=PROMETHEUS),),
    "GET /readyz": _json(a.Ready),
    "GET /v1/accounts/me": _json(a.Account),
    "GET /v1/accounts/me/transfers": _json(a.Transfers),
    "GET /v1/api-keys": _json(a.ApiKeys),
    "GET /v1/bonds/me": _json(a.Bonds),
    "GET /v1/bootstrap": _json(a.Bootstrap),
    "GET /v1/disputes": _json(a.Disputes),
    "GET /v1/disputes/{dispute}": _json(a.DisputeShown),
    "GET /v1/disputes/{dispute}/file": _FILE,
    "GET /v1/escrows": (*_json(a.Escrows), Told(304, media=None)),
    "GET /v1/escrows/{session}": (*_json(a.EscrowShown), Told(304, media=None)),
    "GET /v1/escrows/{session}/claims": _json(a.EscrowClaims),
    "GET /v1/events": (Told(200, media=SSE),),
    "GET /v1/events/page": _json(a.Events),
    "GET /v1/info": _json(a.Info),
    "GET /v1/ledger/audit": _json(a.Audit),
    "GET /v1/offers": _json(a.Offers),
    "GET /v1/operator/reconciliations": _json(a.Reconciliations),
    "GET /v1/payouts": _json(a.Payouts),
    "GET /v1/payouts/{payout}": _json(a.Payout),
    "GET /v1/receipts/{receipt}": _FILE,
    "GET /v1/revocations": _OCTETS,
    "GET /v1/shards": _OCTETS,
    "GET /v1/users/me": _json(a.User),
    "GET /v1/webhooks": _json(a.Webhooks),
    "GET /v1/webhooks/{webhook}": (*_json(a.Webhook), Told(304, media=None)),
    "GET /v1/webhooks/{webhook}/deliveries": _json(a.DeliveryList),
    "POST /log/add-cosignature": _json(a.Cosigned),
    "POST /v1/amendments": _OCTETS,
    "POST /v1/api-keys": _json(a.ApiKeyMade, 201),
    "POST /v1/api-keys/{key}/rotate": _json(a.ApiKeyMade, 201),
    "POST /v1/bonds": _json(a.BondsOf),
    "POST /v1/credits": _json(a.Credited),
    "POST /v1/disputes": _json(a.Dispute),
    "POST /v1/disputes/{dispute}/evidence": _json(a.Dispute),
    "POST /v1/disputes/{dispute}/split": _json(a.Dispute),
    "POST /v1/disputes/{dispute}/withdraw": _json(a.Dispute),
    "POST /v1/grants": _OCTETS,
    "POST /v1/identity/challenge": _json(a.Challenge),
    "POST /v1/identity/register": _json(a.Registered),
    "POST /v1/identity/tls-certificate": _json(a.TlsCertificate),
    "POST /v1/operator/revocations": _json(a.Seq),
    "POST /v1/payouts": _json(a.Payout),
    "POST /v1/sessions": _json(a.LoggedIn),
    "POST /v1/settle": (*_FILE, Told(202, a.Waiting)),
    "POST /v1/users": _json(a.UserMade, 201),
    "POST /v1/users/me/password": _NONE,
    "POST /v1/users/me/peers": _json(a.Peers),
    "POST /v1/webhooks": _json(a.WebhookMade, 201),
    "POST /v1/webhooks/{webhook}/replay": _json(a.Webhook),
    "DELETE /v1/api-keys/{key}": _NONE,
    "DELETE /v1/operator/revocations/{peer}": _NONE,
    "DELETE /v1/sessions/me": _NONE,
    "DELETE /v1/users/me/peers/{peer}": _NONE,
    "DELETE /v1/webhooks/{webhook}": _NONE,
}

# Unsigned requests that change something: repeats under one key are one request.
IDEMPOTENT: Final = frozenset(
    (
        "POST /v1/api-keys",
        "POST /v1/api-keys/{key}/rotate",
        "POST /v1/operator/revocations",
        "POST /v1/webhooks",
        "POST /v1/webhooks/{webhook}/replay",
    )
)
_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": True,
    "description": "A fresh random text for each request, and the same one with its repeats.",
    "schema": {
        "type": "string",
        "minLength": 1,
        "maxLength": IDEMPOTENCY_KEY_CHARS_MAX,
        "pattern": "^[!-~]+$",
    },
}
SCHEMAS: Final = "#/components/schemas/"


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """The document that the framework made, with answers, schemas and headers.

    Raises KeyError for a route that is in no table here.
    """
    shapes = {told.shape for found in ANSWERS.values() for told in found if told.shape is not None}
    ordered = sorted(shapes | {a.Problem}, key=lambda shape: shape.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template=SCHEMAS + "{name}")
    components = document.setdefault("components", {})
    components["schemas"] = {**components.get("schemas", {}), **schemas}
    components["securitySchemes"] = SECURITY_SCHEMES
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete_one(f"{method.upper()} {path}", operation)
    return document


def _complete_one(name: str, operation: dict[str, Any]) -> None:
    operation["responses"] = {
        **{str(told.status): _response(told) for told in ANSWERS[name]},
        "default": {
            "description": "Why it was refused.",
            "content": {MEDIA_TYPE: {"schema": {"$ref": f"{SCHEMAS}Problem"}}},
        },
    }
    if name in IDEMPOTENT:
        operation.setdefault("parameters", []).append(_KEY)
    elif name == "POST /v1/payouts":  # its JSON form needs the key, its signed form does not
        operation.setdefault("parameters", []).append({**_KEY, "required": False})


def _response(told: Told) -> dict[str, Any]:
    if told.media is None:
        return {"description": "Nothing more to say."}
    if told.shape is not None:
        schema: dict[str, Any] = {"$ref": SCHEMAS + told.shape.__name__}
        description = (told.shape.__doc__ or "").partition("\n")[0]
    elif told.media == JSON:
        schema, description = (
            {"type": "object"},
            "A file that can be checked without asking anyone.",
        )
    else:
        schema, description = {"type": "string"}, "A document or text of its own format."
        if told.media == OCTETS:
            schema["format"] = "binary"
    return {"description": description, "content": {told.media: {"schema": schema}}}
