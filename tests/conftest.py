"""`make soak` runs random tests at length: it names this profile, and they ask whether it is the one in use."""

import os

from hypothesis import settings

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, as transformers does where it is installed

settings.register_profile("soak", deadline=None)
