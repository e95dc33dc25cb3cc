"""`make soak` runs random tests at length: it names this profile, and they ask whether it is the one in use."""

import gc
import os
from collections.abc import Generator

import pytest
from hypothesis import settings

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, as transformers does where it is installed
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of numpy, by which the interpreter multiplies small tiles: more threads spin, where others want the core
# Where a client of httpx looks for certificates, at each of thousands: none here speaks TLS, and to read all there are takes 40 ms.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.path.dirname(__file__)

settings.register_profile("soak", deadline=None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules are imported, torch's and transformers' among them, and nothing of that is garbage: to look for some takes each process seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What commands keep for the next one stays with the session."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache_home"))
