"""Run an https server on loopback, with a resolver and a rule that let tests connect to it."""

import datetime as dt
import ipaddress
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["HOSTS", "Answer", "https_server", "trusting"]

HOSTS = ["images.example.org", "other.example.org"]
Answer = Callable[[BaseHTTPRequestHandler], None]


def write_certificate(path: Path) -> None:
    """Make a self-signed certificate for HOSTS, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(certificate.public_bytes(pem) + key.private_bytes(pem, form, plain))


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that rejects the certificate or closes the connection."""
        if not isinstance(sys.exc_info()[1], ssl.SSLError | ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def https_server(certificate: Path, answers: dict[str, Answer]) -> Iterator[int]:
    """Run a server that answers each path by the current `answers`. Yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers[self.path](self)

        def log_message(self, *_: object) -> None:
            pass

    write_certificate(certificate)
    server = _Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def trusting(certificate: Path) -> ssl.SSLContext:
    """Return an SSL context that trusts this server."""
    return ssl.create_default_context(cafile=certificate)


def is_loopback_or(is_public: Callable[[str], bool]) -> Callable[[str], bool]:
    """Return a rule that also accepts 127.0.0.1 as a public address."""
    return lambda address: ipaddress.ip_address(address).is_loopback or is_public(address)
