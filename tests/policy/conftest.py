"""Hypothesis profiles of the policy tests: `quick` by default, and `pytest tests/policy --hypothesis-profile=soak` to run for minutes."""

from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]}
settings.register_profile("soak", max_examples=4000, stateful_step_count=80, **_COMMON)
