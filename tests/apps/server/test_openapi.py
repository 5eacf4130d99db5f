"""The server against its own description, by schemathesis: no request that it allows or forbids makes a 500, another
status or another type than it says."""

from collections import Counter

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from tests.apps.server.running import running, speaking

schemathesis = pytest.importorskip("schemathesis")
openapi_checks = pytest.importorskip("schemathesis.specs.openapi.checks")


@pytest.fixture(scope="module")
def url():
    with running(lambda: speaking(lambda prompt: ("Hm.", "Hi"), num_pages=2048)) as address:
        yield address


def test_it_names_every_endpoint(url) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert {"/v1/chat/completions", "/v1/messages", "/v1/responses/{name}", "/tokenize", "/health"} <= set(
        document["paths"]
    )
    assert set(document["paths"]["/v1/responses/{name}"]) == {"get", "delete"}
    body = document["paths"]["/v1/messages"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rpartition("/")[2]
    assert set(document["components"]["schemas"][name]["required"]) == {"messages", "max_tokens"}


_CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]

_SETTINGS = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("is_allowed", [True, False])
def test_it_does_as_it_says(url, is_allowed: bool) -> None:
    mode = schemathesis.GenerationMode.POSITIVE if is_allowed else schemathesis.GenerationMode.NEGATIVE
    statuses = Counter()
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()
        if not is_allowed and not operation.body:
            continue  # nothing about it can be wrong

        @_SETTINGS
        @given(operation.as_strategy(mode))
        def ask(case) -> None:
            response = case.call_and_validate(checks=_CHECKS, timeout=120)
            statuses[response.status_code] += 1

        ask()
    # six endpoints take nothing; of random bodies few make sense
    assert statuses[200] > 8 if is_allowed else statuses[400] > 100, statuses
