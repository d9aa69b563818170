"""Read images at https:// addresses of allowed hosts, only from public IP addresses.

The author of a list must not gain access to this machine's own network. Therefore each connection
checks the IP address that it uses, and a name that resolves differently the next time cannot bypass
the check.
"""

import errno
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from urllib.parse import SplitResult, urljoin, urlsplit

from qwen_vit.errors import ImageError, with_options
from qwen_vit.images.image import ImageLimits, check_file_bytes, is_allowed_host

__all__ = ["is_https", "read_url"]

HTTPS = re.compile("https://", re.IGNORECASE)
HTTPS_PORT = 443
MAX_REDIRECTS = 5
MAX_SECONDS = 60.0  # for one attempt to fetch an image, including redirects
TIMEOUT_S = 10.0  # for one step, such as connecting
CHUNK_BYTES = 2**16
REDIRECTS = (301, 302, 303, 307, 308)
UNREACHABLE = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN)
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that represent IPv4 addresses
HEADERS = {"User-Agent": "qwen-vit", "Accept": "image/*", "Accept-Encoding": "identity"}


class _RefusedError(Exception):
    """Report a failure that a retry cannot fix: a bad address, a bad response or a timeout."""

    def __init__(self, fact: str, remedy: str, code: str) -> None:
        super().__init__(fact)
        self.fact, self.remedy, self.code = fact, remedy, code


def is_https(source: str) -> bool:
    """Return whether a source is an https:// address.

    >>> is_https("https://example.org/a.jpg"), is_https("a.jpg")
    (True, False)
    """
    return HTTPS.match(source) is not None


def read_url(url: str, name: str, limits: ImageLimits) -> bytes:
    """Return the bytes at an address. `limits.allow_urls` must contain the address's host and the
    hosts of redirects.

    For a transient network error, the ImageError's `__context__` is a TimeoutError with errno
    ETIMEDOUT.
    """
    end = time.monotonic() + MAX_SECONDS
    try:
        for _ in range(MAX_REDIRECTS + 1):
            with _faults_as_timeouts(), _response(url, limits, end) as response:
                target = response.headers.get("Location")
                if response.status not in REDIRECTS or target is None:
                    return _body(response, name, limits, end)
                url = _joined(url, target)
        raise _RefusedError(f"more than {MAX_REDIRECTS} redirects", "list the final address", "url")
    except _RefusedError as error:
        raise ImageError(error.fact, name=name, remedy=error.remedy, code=error.code) from None
    except ssl.SSLCertVerificationError as error:
        raise ImageError(
            f"the host has no valid certificate ({error.verify_message})",
            name=name,
            remedy="check the address",
            code="unreadable",
        ) from None
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= end:
            raise ImageError(**_too_slow(), name=name) from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(
            f"cannot be fetched ({reason})", name=name, remedy="try again later", code="unreadable"
        ) from error


def _joined(url: str, target: str) -> str:
    try:
        return urljoin(url, target)
    except ValueError:
        raise _RefusedError(
            "redirects to an invalid address", "list the final address", "url"
        ) from None


@contextmanager
def _faults_as_timeouts() -> Iterator[None]:
    """Raise transient network errors as TimeoutError with ETIMEDOUT, because some have no errno."""
    try:
        yield
    except http.client.IncompleteRead as error:
        raise TimeoutError(errno.ETIMEDOUT, "the connection ended early") from error
    except OSError as error:
        is_transient = (
            isinstance(error, TimeoutError | ConnectionError | ssl.SSLEOFError)
            or error.errno in UNREACHABLE
            or (isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN)
        )
        if not is_transient:
            raise
        raise TimeoutError(errno.ETIMEDOUT, error.strerror or str(error)) from error


@contextmanager
def _response(url: str, limits: ImageLimits, end: float) -> Iterator[http.client.HTTPResponse]:
    parts, host, port = _checked(url, limits)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with closing(_Connection(host, port, end)) as connection, _ends_at(connection, end):
        connection.request("GET", path, headers=HEADERS)
        with closing(connection.getresponse()) as response:
            yield response


@contextmanager
def _ends_at(connection: http.client.HTTPConnection, end: float) -> Iterator[None]:
    """Close a connection at a given time, even if the other side sends slowly."""

    def cut() -> None:
        if connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_seconds_to(end), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _checked(url: str, limits: ImageLimits) -> tuple[SplitResult, str, int]:
    try:
        if not url.isascii() or re.search(r"[\x00-\x20\x7f]", url):
            raise ValueError
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower().rstrip("."), parts.port or HTTPS_PORT
    except ValueError:
        raise _RefusedError(
            "not a valid address",
            "check the host and the port, and write special characters of the path as %XX",
            "url",
        ) from None
    if parts.scheme.lower() != "https":
        raise _RefusedError(
            f"leads to {parts.scheme}://",
            "list an https:// address, or download the image first",
            "url",
        )
    if parts.username is not None or parts.password is not None:
        raise _RefusedError("contains a user name or password", "download the image first", "url")
    if not is_allowed_host(host, port, limits.allow_urls):
        where = host if port == HTTPS_PORT else f"{host}:{port}"
        raise _RefusedError(
            f"host {where} is not allowed", with_options("add it to {}", "allow_urls"), "url"
        )
    return parts, host, port


class _Connection(http.client.HTTPSConnection):
    """Connect to a public address, without a proxy and before a deadline."""

    def __init__(self, host: str, port: int, end: float) -> None:
        super().__init__(host, port, timeout=TIMEOUT_S, context=_context())
        self._end = end

    def connect(self) -> None:
        addresses = _public_addresses(self.host, self.port)
        error: OSError | None = None
        for address in addresses:
            try:
                seconds = min(_seconds_to(self._end), TIMEOUT_S)
                plain = socket.create_connection((address, self.port), seconds)
            except OSError as failed:
                error = failed
                continue
            self.sock = _context().wrap_socket(plain, server_hostname=self.host)
            return
        raise error or OSError(f"{self.host} has no address")


def _public_addresses(host: str, port: int) -> list[str]:
    """Return a host's addresses. Raises _RefusedError if one of them is not public."""
    addresses = _resolve(host, port)
    for address in addresses:
        if not _is_public(address):
            raise _RefusedError(
                f"host {host} is at {address}, which is not a public address",
                "download the image first",
                "url",
            )
    return addresses


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def _is_public(address: str) -> bool:
    """Return whether an address is not private, loopback, link-local, multicast or reserved.

    >>> _is_public("8.8.8.8"), _is_public("169.254.169.254"), _is_public("::ffff:10.0.0.1")
    (True, False, False)
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and (
        found.ipv4_mapped or found.sixtofour or found.teredo or found in NAT64
    ):
        return False  # it may contain a private IPv4 address
    return found.is_global and not found.is_multicast


def _body(response: http.client.HTTPResponse, name: str, limits: ImageLimits, end: float) -> bytes:
    status = response.status
    if status in (404, 410):
        raise _RefusedError(f"does not exist (HTTP {status})", "check the address", "missing")
    if status in TRY_AGAIN:
        raise TimeoutError(errno.ETIMEDOUT, f"HTTP {status}")
    if status != 200:
        raise _RefusedError(f"cannot be fetched (HTTP {status})", "check the address", "unreadable")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _RefusedError(
            "the server compresses the image", "download the image first", "unreadable"
        )
    length = response.length
    if length is not None:
        check_file_bytes(length, name, limits)
    data = bytearray()
    while chunk := response.read1(CHUNK_BYTES):
        data += chunk
        check_file_bytes(len(data), name, limits)
        _seconds_to(end)
    if length is not None and len(data) < length:
        raise TimeoutError(
            errno.ETIMEDOUT, f"the connection ended after {len(data)} of {length} bytes"
        )
    return bytes(data)


def _seconds_to(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise _RefusedError(**_too_slow())
    return left


def _too_slow() -> dict[str, str]:
    fact = f"was not fetched within {MAX_SECONDS:g} s"
    return {"fact": fact, "remedy": "download the image first", "code": "slow"}


@lru_cache
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()
