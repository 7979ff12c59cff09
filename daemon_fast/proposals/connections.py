"""Connections to an HTTP server that are kept from request to request: a general client takes ten times as long, a
millisecond of a reply with 25 candidates, and can't let go of a request whose reply nobody waits for any more."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from daemon_fast import stop
from daemon_fast.errors import InvalidInput

__all__ = ["Connections", "HTTPReply"]

MOST_REDIRECTS = 5
CONNECT_TIMEOUT = 10.0  # seconds; a server that thinks for minutes still accepts connections at once
# How a server closes a connection that it has kept for long enough.
CLOSED = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)


@dataclass(frozen=True)
class HTTPReply:
    status: int
    reason: str
    headers: http.client.HTTPMessage
    body: bytes


class Connections:
    """To one server; several threads may send at a time, each over one of its own.

    Proxies are those that the environment names (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY), certificates those that
    the system trusts (or SSL_CERT_FILE).

    Parameters
    ----------
    base_url : whose path begins those that are asked for; a name and a password in it go with each request, in place of
        an Authorization header
    headers : of every request
    timeout : seconds without a byte of the reply

    Attributes
    ----------
    address : base_url, without name and password: what may be told

    Raises
    ------
    InvalidInput
        An address that is none; a proxy that doesn't speak HTTP.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str], timeout: float) -> None:
        try:
            at = urllib.parse.urlsplit(base_url)
            self._host, self._port = at.hostname or "", at.port
        except ValueError as error:
            raise InvalidInput(f"base_url = {base_url!r} is no address: {error}") from None
        if at.scheme not in ("http", "https") or not self._host:
            raise InvalidInput(f"base_url = {base_url!r} must be an address such as 'http://localhost:8000/v1'")
        self._secure, self._timeout = at.scheme == "https", timeout
        self._headers, self._of_proxy = dict(headers), dict[str, str]()
        self._prefix, self._proxy = at.path.rstrip("/"), None
        netloc = at.netloc.rpartition("@")[2]
        self.address, self._origin = at._replace(netloc=netloc).geturl(), f"{at.scheme}://{netloc}"
        if at.username is not None:
            self._headers["Authorization"] = _basic(at)
        proxies = {} if urllib.request.proxy_bypass(self._host) else urllib.request.getproxies()
        if named := proxies.get(at.scheme) or proxies.get("all"):
            self._proxy = urllib.parse.urlsplit(named if "://" in named else f"http://{named}")
            if self._proxy.scheme != "http" or not self._proxy.hostname:
                raise InvalidInput(f"{base_url} is behind a proxy of the kind {self._proxy.scheme}: it must be http")
            if self._proxy.username is not None:
                self._of_proxy["Proxy-Authorization"] = _basic(self._proxy)
            if not self._secure:  # which is told the whole address
                self._prefix = f"{self._origin}{self._prefix}"
                self._headers |= self._of_proxy
        self._idle: list[http.client.HTTPConnection] = []

    def __del__(self) -> None:
        for connection in getattr(self, "_idle", ()):
            connection.close()

    def send(self, method: str, path: str, body: bytes | None = None) -> HTTPReply:
        """What the server answers, of whatever status; from where it says on the same server, if it says so.

        Raises
        ------
        OSError, http.client.HTTPException
            There is no reply, or only a part of one.
        Stopped
            Nobody waits for it any more: the connection is closed, by which the server can tell.
        """
        target = self._prefix + path
        for _ in range(MOST_REDIRECTS):
            reply = self._sent(method, target, body)
            target = self._elsewhere(method, reply, target)
            if not target:
                break
        return reply

    def _elsewhere(self, method: str, reply: HTTPReply, target: str) -> str:
        """Where to ask for the same again, on the same server; "" where a reply does not say so."""
        if reply.status not in (307, 308) and (method != "GET" or reply.status not in (301, 302)):
            return ""
        own = target if "://" in target else f"{self._origin}{target}"
        there = urllib.parse.urljoin(own, reply.headers.get("Location", own))
        if not there.startswith(f"{self._origin}/"):
            return ""
        return there if "://" in target else there.removeprefix(self._origin)

    def _sent(self, method: str, target: str, body: bytes | None) -> HTTPReply:
        wanted = stop.current()
        while True:
            try:
                connection, kept = self._idle.pop(), True
            except IndexError:
                connection, kept = self._new(), False
            try:
                with wanted.ends(lambda own=connection: _shut(own)):  # type: ignore[misc]
                    if not kept:
                        connection.connect()
                        assert connection.sock is not None
                        connection.sock.settimeout(self._timeout)
                        wanted.check()  # set before there was a socket to shut
                    connection.request(method, target, body, self._headers)
                    reply = connection.getresponse()
                    data = reply.read()
            except BaseException as error:
                connection.close()
                wanted.check()
                if kept and isinstance(error, CLOSED):
                    continue  # closed while it was idle
                raise
            if not reply.will_close:
                self._idle.append(connection)
            return HTTPReply(reply.status, reply.reason, reply.headers, data)

    def _new(self) -> http.client.HTTPConnection:
        host, port = (self._host, self._port) if self._proxy is None else (self._proxy.hostname, self._proxy.port or 80)
        assert host is not None
        if not self._secure:
            return http.client.HTTPConnection(host, port, timeout=CONNECT_TIMEOUT)
        connection = http.client.HTTPSConnection(host, port, timeout=CONNECT_TIMEOUT, context=self._trusted)
        if self._proxy is not None:
            connection.set_tunnel(self._host, self._port or 443, self._of_proxy)
        return connection

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        return ssl.create_default_context()


def _basic(at: urllib.parse.SplitResult) -> str:
    """The header that tells an address's name and password."""
    who = ":".join(urllib.parse.unquote(part or "") for part in (at.username, at.password))
    return f"Basic {base64.b64encode(who.encode()).decode()}"


def _shut(connection: http.client.HTTPConnection) -> None:
    """Wake up who waits for a byte of it: to close it would not."""
    with contextlib.suppress(OSError, AttributeError):  # not yet open, or closed already
        connection.sock.shutdown(socket.SHUT_RDWR)
