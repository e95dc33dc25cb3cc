"""What a server was asked for: frozen, validated once."""

from __future__ import annotations

import ipaddress
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from quire.errors import ConfigError
from quire.server.keys import KeyRing


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Options of one server, beside the engine's own.

    Fields:
        model: the name that clients know the model by.
        host, port: where to listen; port 0 takes a free one.
        keys: who may ask. Without keys everybody who reaches the server may.
        cors_origins: web pages of these origins may ask from a browser; "*" for all.
        grace_s: seconds that running requests have to end in when the server is told to.

    Raises:
        ConfigError: a value out of its range, naming field, value and limit.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    keys: KeyRing = field(default_factory=KeyRing, repr=False)
    cors_origins: tuple[str, ...] = ()
    grace_s: float = 30.0
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError(f"served_model_name={self.model!r}: must be a name")
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port < 2**16:
            raise ConfigError(f"port={self.port!r}: must be an integer from 0 to {2**16 - 1}")
        if not math.isfinite(self.grace_s) or self.grace_s < 0:
            raise ConfigError(f"grace={self.grace_s!r}: must be a number of seconds, 0 or more")
        for origin in self.cors_origins:
            if origin != "*" and (not origin.startswith(("http://", "https://")) or origin.count("/") != 2):
                raise ConfigError(f"cors_origin={origin!r}: must be '*' or an origin, such as 'http://localhost:3000'")

    @property
    def on_loopback(self) -> bool:
        """Whether nobody outside this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def public_name(model: str) -> str:
    """What a model is called in public: a hub id as it is, of a folder the last part, so that no path is shown."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() or folder.is_absolute() or model.startswith((".", "~")) else model
