"""The server asked by schemathesis from its own OpenAPI document, with bodies that fit it and bodies that do not; far more of them in `make soak`.

Skipped where schemathesis is not installed; `make soak` installs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest.importorskip("schemathesis", reason="schemathesis is not installed (pip install schemathesis)")
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from quire import LLM
from quire.server.limits import MAX_LABEL_CHARS
from tests.server.conftest import KEY, Running, running
from tests.server.test_openapi import document

SOAK = settings.get_current_profile_name() == "soak"
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.missing_required_header,
    checks.ignored_auth,
]
MOST_CHOICES = 3

schema = schemathesis.openapi.from_dict(document())
schema.config.generation.update(modes=list(GenerationMode))
schema.config.phases.coverage.enabled = SOAK


@pytest.fixture(scope="module")
def small(model: str) -> Iterator[Running]:
    """A server whose answers are short, however many tokens are asked for."""
    with running(lambda: LLM(model, page_size=4, max_model_len=48, cache_bytes=2**20, num_threads=1)) as one:
        yield one
        one.serving.close()


def with_sense(case: Any) -> Any:
    """The same with the name of our model, which no generator finds, and with fewer choices than may be asked for."""
    if isinstance(case.body, dict):
        if isinstance(case.body.get("model"), str) and len(case.body["model"]) <= MAX_LABEL_CHARS:
            case.body["model"] = "tiny"
        for name in ("n", "best_of"):
            if type(case.body.get(name)) is int and case.body[name] > MOST_CHOICES:
                case.body[name] = 10**9 if case.body[name] > 128 else MOST_CHOICES
    return case


@schema.parametrize()
@settings(max_examples=300 if SOAK else 8, derandomize=not SOAK, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_the_document_says(case: Any, small: Running) -> None:
    with_sense(case).call_and_validate(base_url=small.url, headers={"Authorization": f"Bearer {KEY}"}, checks=CHECKS, timeout=60)
    assert small.llm.failure is None
