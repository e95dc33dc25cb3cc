"""`make soak` runs random tests at length: it names this profile, and they ask whether it is the one in use."""

import os

from hypothesis import settings

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, as transformers does where it is installed
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of numpy, by which the interpreter multiplies small tiles: more threads spin, where others want the core

settings.register_profile("soak", deadline=None)
