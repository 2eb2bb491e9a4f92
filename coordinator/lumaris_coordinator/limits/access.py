"""Who may use each route: the whole table, held to the app and to its behaviour by the tests.

- anyone: public, nothing of anybody's own is told
- signed: the body is a document whose signature says who asks
- read, write, operator: a token or API key with that scope, and only for the caller's own things
- payout: signed, or with the scope write
- witness: the body holds a cosignature of a witness that is known here
"""

from __future__ import annotations

from typing import Final, Literal

Access = Literal["anyone", "signed", "read", "write", "operator", "payout", "witness"]

ACCESS: Final[dict[str, Access]] = {
    "GET /.well-known/lumaris-keys": "anyone",
    "GET /healthz": "anyone",
    "GET /readyz": "anyone",
    "GET /metrics": "anyone",
    "GET /v1/info": "anyone",
    "GET /v1/bootstrap": "anyone",
    "GET /v1/shards": "anyone",
    "GET /v1/offers": "anyone",
    "GET /v1/revocations": "anyone",
    "GET /v1/ledger/audit": "anyone",
    "GET /log/checkpoint": "anyone",
    "GET /log/consistency": "anyone",
    "GET /log/tile/{name:path}": "anyone",
    "POST /log/add-cosignature": "witness",
    "POST /v1/identity/challenge": "anyone",
    "POST /v1/identity/register": "signed",
    "POST /v1/identity/tls-certificate": "signed",
    "POST /v1/users": "anyone",
    "POST /v1/sessions": "anyone",
    "DELETE /v1/sessions/me": "read",
    "GET /v1/users/me": "read",
    "POST /v1/users/me/password": "write",
    "POST /v1/users/me/peers": "write",
    "DELETE /v1/users/me/peers/{peer}": "write",
    "GET /v1/api-keys": "read",
    "POST /v1/api-keys": "write",
    "POST /v1/api-keys/{key}/rotate": "write",
    "DELETE /v1/api-keys/{key}": "write",
    "POST /v1/operator/revocations": "operator",
    "DELETE /v1/operator/revocations/{peer}": "operator",
    "GET /v1/operator/reconciliations": "operator",
    "POST /v1/credits": "signed",
    "GET /v1/accounts/me": "read",
    "GET /v1/accounts/me/transfers": "read",
    "POST /v1/bonds": "signed",
    "GET /v1/bonds/me": "read",
    "POST /v1/payouts": "payout",
    "GET /v1/payouts": "read",
    "GET /v1/payouts/{payout}": "read",
    "POST /v1/grants": "signed",
    "POST /v1/amendments": "signed",
    "POST /v1/settle": "signed",
    "GET /v1/escrows": "read",
    "GET /v1/escrows/{session}": "read",
    "GET /v1/escrows/{session}/claims": "read",
    "GET /v1/receipts/{receipt}": "read",
    "POST /v1/disputes": "signed",
    "GET /v1/disputes": "read",
    "GET /v1/disputes/{dispute}": "read",
    "GET /v1/disputes/{dispute}/file": "read",
    "POST /v1/disputes/{dispute}/evidence": "signed",
    "POST /v1/disputes/{dispute}/withdraw": "signed",
    "POST /v1/disputes/{dispute}/split": "signed",
    "GET /v1/events": "read",
    "GET /v1/events/page": "read",
    "WS /v1/stream": "read",
    "POST /v1/webhooks": "write",
    "GET /v1/webhooks": "read",
    "GET /v1/webhooks/{webhook}": "read",
    "DELETE /v1/webhooks/{webhook}": "write",
    "GET /v1/webhooks/{webhook}/deliveries": "read",
    "POST /v1/webhooks/{webhook}/replay": "write",
}
