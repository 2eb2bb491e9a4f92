"""The OpenAPI document: complete, valid 3.1, and kept by the server under strange requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import allow_header_conformance, not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from lumaris_coordinator import answers
from lumaris_coordinator.openapi import ANSWERS, IDEMPOTENT
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market
from tests.coordinator.served import Served

# A stream without an end: test_events holds it to its word.
ENDLESS = "/v1/events"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
    allow_header_conformance,
    ignored_auth,
]


async def document(market: Market) -> dict[str, Any]:
    answer = await market.client.get("/v1/openapi.json")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


async def test_each_route_tells_what_it_answers(market: Market) -> None:
    found = await document(market)
    assert found["openapi"].startswith("3.1.")
    names = {
        f"{method.upper()} {path}"
        for path, operations in found["paths"].items()
        for method in operations
    }
    assert names == set(ANSWERS)
    assert names >= IDEMPOTENT
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], path
            if method == "post" and "security" in operation and path != "/v1/payouts":
                described = "Idempotency-Key" in json.dumps(operation)
                signed = "application/octet-stream" in json.dumps(operation.get("requestBody"))
                assert described != signed or path in ("/v1/users/me/password",), path


async def test_its_schemas_are_schemas_and_its_references_lead_somewhere(market: Market) -> None:
    found = await document(market)
    schemas = found["components"]["schemas"]
    for schema in schemas.values():
        jsonschema_rs.meta.validate(schema)
    text = json.dumps(found)
    for part in text.split('"$ref": "')[1:]:
        name = part.partition('"')[0]
        assert name.removeprefix("#/components/schemas/") in schemas
    assert set(schemas["Problem"]["required"]) == set(answers.Problem.__struct_fields__)


async def test_nothing_is_loaded_from_strangers(market: Market) -> None:
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert (await market.client.get(path)).status_code == 404


@pytest.mark.slow
def test_strange_requests_get_answers_that_are_described(tmp_path: Path) -> None:
    """Each operation gets some requests that fit its description and some that do not."""
    served = Served(tmp_path / "state")
    with served.running():
        schema = schemathesis.openapi.from_url(f"{served.url}/v1/openapi.json")
        failures: list[str] = []
        tried = 0
        for result in schema.get_all_operations():
            assert isinstance(result, Ok), result
            operation = result.ok()
            if operation.path != ENDLESS:
                tried += 1
                failures += try_operation(operation, served.token)
    assert tried == len(ANSWERS) - 1
    assert not failures, "\n\n".join(failures)


def try_operation(operation: Any, token: str) -> list[str]:
    """What was wrong with the answers to one operation."""
    headers = {"Authorization": f"Bearer {token}"}
    strategy = operation.as_strategy()
    if operation.body or list(operation.iter_parameters()):
        strategy |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    found: list[str] = []

    @hypothesis.seed(5)
    @hypothesis.settings(
        max_examples=4,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def attempt(case: Any) -> None:
        case.call_and_validate(headers=headers, checks=CHECKS)

    try:
        attempt()
    except (Exception, BaseExceptionGroup) as error:
        found.append(f"{operation.label}: {error!r:.2000}")
    return found


def test_a_problem_is_what_the_document_says() -> None:
    error = LumarisError("no_funds")
    assert error.to_json().keys() <= {*answers.Problem.__struct_fields__, "message"}
