"""`make soak` runs the random tests at length, 100,000 actions; `oracle.SOAK` says so to them."""

from hypothesis import settings

settings.register_profile("soak", deadline=None)
