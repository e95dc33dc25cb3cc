"""A server elsewhere, by the standard library's HTTP client: the command line needs no other."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import threading
from typing import Any
from urllib.parse import urlsplit

from quire.errors import ConfigError, RequestFailedError

CONNECT_S = 10


def is_url(text: str) -> bool:
    """Whether this is a server's address and not a model's name."""
    return text.lower().startswith(("http://", "https://"))


class Remote:
    """One server, asked by any thread; each keeps a connection of its own.

    Args:
        url: such as http://localhost:8000, with or without the /v1 that other clients want.

    Raises:
        ConfigError: it is no such address.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        try:
            parts = urlsplit(url)
            self._host, self._port, self._tls = parts.hostname or "", parts.port, parts.scheme == "https"
            self._host.encode("idna")  # as it is looked up
        except ValueError:
            self._host = ""
        if not is_url(url) or not self._host or parts.query or parts.fragment or not re.fullmatch("[!-~]*", parts.path):
            raise ConfigError(f"url={url!r}: must be a server's address, such as http://localhost:8000")
        if parts.username is not None:  # which would go nowhere
            raise ConfigError("url: must have no user or password in it; a key is given with --api-key")
        key = (api_key or "").strip()
        if not key.isprintable():  # not told: it is a secret
            raise ConfigError("api_key: must be text on one line, without control characters")
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self.shown = f"{parts.scheme}://{parts.netloc}{self._root}"
        self._headers: dict[str, str | bytes] = {"content-type": "application/json", **({"authorization": f"Bearer {key}".encode()} if key else {})}
        self._own = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = False

    def check(self) -> str | None:
        """The name of the first model it serves, None where it does not say.

        Raises:
            RequestFailedError: it is not to be reached, or does not let us in.
        """
        try:
            response = self._send("GET", "/v1/models", None)
            told, status = response.read(), response.status
        except (OSError, http.client.HTTPException) as error:
            raise RequestFailedError(f"{self.shown} does not answer ({error.__class__.__name__}: {error})") from error
        if status in (401, 403):
            raise RequestFailedError(f"{self.shown} does not take this key: give it with --api-key or QUIRE_API_KEY")
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            return str(json.loads(told)["data"][0]["id"])
        return None

    def post(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer.

        Raises:
            OSError: nobody answers, or not in HTTP.
        """
        try:
            response = self._send("POST", path, body)
            return response.status, {name.lower(): value for name, value in response.headers.items()}, response.read()
        except http.client.HTTPException as error:
            self.drop()
            raise ConnectionError(f"{error.__class__.__name__}: {error}") from error
        except OSError:
            self.drop()
            raise

    def stream(self, path: str, body: bytes) -> http.client.HTTPResponse:
        """The answer, to be read line by line as it comes. Left early, it must be ended by `drop`."""
        return self._send("POST", path, body)

    def drop(self) -> None:
        """End this thread's connection, and what is asked in it."""
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            self._own.connection = None
            self._open.discard(connection)
            connection.close()

    def close(self) -> None:
        """End all connections, also those in which others wait for an answer."""
        self._closed = True
        for connection in list(self._open):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        reused = getattr(self._own, "connection", None) is not None
        try:
            connection = self._connection()
            connection.request(method, self._root + path, body, self._headers)
            response: http.client.HTTPResponse = connection.getresponse()
            return response
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            self.drop()
            if not reused or self._closed:
                raise
            return self._send(method, path, body)  # the server had closed a connection that was idle: the next is a new one

    def _connection(self) -> Any:
        connection = getattr(self._own, "connection", None)
        if connection is None:
            if self._closed:
                raise ConnectionError("the connections have been closed")
            if self._tls:
                connection = http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_S, context=ssl.create_default_context())
            else:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
            connection.connect()
            connection.sock.settimeout(None)  # a long answer takes its time
            self._own.connection = connection
            self._open.add(connection)
        return connection
