"""`make soak` runs random tests at length: it names this profile, and they ask whether it is the one in use."""

from hypothesis import settings

settings.register_profile("soak", deadline=None)
