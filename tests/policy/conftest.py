"""`pytest tests/policy --hypothesis-profile=soak` runs the random tests at length (about an hour); `oracle.SOAK` says so to them."""

from hypothesis import settings

settings.register_profile("soak", deadline=None)
