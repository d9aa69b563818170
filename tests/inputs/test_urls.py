"""Test images at https:// addresses: allowed hosts, public addresses, and limits."""

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, ImageError
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.resume import read_start_options
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs import read as read_module
from qwen_vit.inputs import urls
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.read import read_item
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.https_server import Answer, https_server, is_loopback_or, trusting

HOST, OTHER = "images.example.org", "other.example.org"
IS_PUBLIC = urls._is_public


class Site:
    """Hold a running server and the answers of its paths."""

    def __init__(self, port: int, answers: dict[str, Answer]) -> None:
        self.port, self.answers = port, answers

    def url(self, path: str, host: str = HOST) -> str:
        return f"https://{host}:{self.port}{path}"

    def limits(self, *hosts: str, **more: Any) -> ImageLimits:
        names = tuple(f"{host}:{self.port}" for host in hosts or (HOST,))
        return ImageLimits(allow_urls=names, **more)

    def failure(self, path: str, limits: ImageLimits | None = None, host: str = HOST) -> ImageError:
        url = self.url(path, host)
        with pytest.raises(ImageError) as caught:
            read_item(Item(url, url), limits or self.limits())
        return caught.value


def body(data: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(data)), **named}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)

    return answer


def redirect(target: str) -> Answer:
    return body(b"", 302, Location=target)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Path]]:
    certificate, answers = tmp_path_factory.mktemp("site") / "certificate.pem", dict[str, Answer]()
    with https_server(certificate, answers) as port:
        yield Site(port, answers), certificate


@pytest.fixture
def site(running: tuple[Site, Path], monkeypatch: pytest.MonkeyPatch) -> Site:
    """Return the server, whose hosts have the address 127.0.0.1, which counts as public in these
    tests."""
    found, certificate = running
    found.answers.clear()
    found.answers["/a.png"] = body(tiny_png(1))
    monkeypatch.setattr(urls, "_resolve", lambda *_: ["127.0.0.1"])
    monkeypatch.setattr(urls, "_is_public", is_loopback_or(IS_PUBLIC))
    monkeypatch.setattr(urls, "_context", lambda: trusting(certificate))
    monkeypatch.setattr(read_module, "PAUSES_S", (0, 0))
    return found


def test_an_export_fetches_allowed_addresses_of_a_list(site: Site, tmp_path: Path) -> None:
    site.answers["/b.png?size=1"] = body(tiny_png(2))
    lines = [site.url("/a.png"), site.url("/b.png?size=1"), site.url("/a.png", OTHER)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    encoder: Any = FakeEncoder()
    options = ExportOptions(limits=site.limits())
    assert estimate_export(encoder, [str(tmp_path / "list.txt")], options).unreadable == 1
    done = export_features(encoder, [tmp_path / "list.txt"], tmp_path / "out", options)
    assert (done.exported, done.failed) == (2, {"url": 1})
    stored = load_features(tmp_path / "out")
    assert list(stored.ids) == lines[:2]
    assert f"host {OTHER}:{site.port} is not allowed" in stored.errors[0].message
    assert read_start_options(tmp_path / "out").options.limits == site.limits()
    done = export_features(encoder, None, tmp_path / "out", options)
    assert done.resumed == 3


def test_no_address_is_fetched_by_default(site: Site) -> None:
    error = site.failure("/a.png", ImageLimits())
    assert (error.code, error.fact) == ("url", "an address, not a file")


def test_redirects_within_the_allowed_hosts_are_followed(site: Site) -> None:
    site.answers["/1"] = redirect("/2")
    site.answers["/2"] = redirect(site.url("/a.png", OTHER))
    url = site.url("/1")
    assert read_item(Item(url, url), site.limits(HOST, OTHER)) == tiny_png(1)
    assert f"host {OTHER}:{site.port} is not allowed" in site.failure("/1").fact


@pytest.mark.parametrize(
    ("target", "fact"),
    [
        ("/loop", "more than 5 redirects"),
        ("http://images.example.org/a.png", "leads to http://"),
        ("https://user:pass@images.example.org/", "contains a user name or password"),
        ("file:///etc/passwd", "leads to file://"),
        ("https://169.254.169.254/latest", "host 169.254.169.254 is not allowed"),
        ("https://images.example.org:22/", "host images.example.org:22 is not allowed"),
        ("https://images.example.org:x/", "not a valid address"),
        ("/a b", "not a valid address"),
        ("http://[", "redirects to an invalid address"),
    ],
)
def test_redirects_to_other_hosts_are_refused(site: Site, target: str, fact: str) -> None:
    site.answers["/loop"] = redirect(target)
    error = site.failure("/loop")
    assert fact in error.fact
    assert (error.code, bool(error.remedy)) == ("url", True)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
        "100.64.0.1", "224.0.0.1", "::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1",
        "64:ff9b::a00:1", "2002:a00:1::", "ff02::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_never_connected_to(
    site: Site, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """The check also rejects a name with an additional public address, as in DNS rebinding."""
    connected: list[Any] = []
    monkeypatch.setattr(urls, "_is_public", IS_PUBLIC)
    monkeypatch.setattr(urls, "_resolve", lambda *_: ["93.184.215.14", address])
    monkeypatch.setattr(socket, "create_connection", lambda *each: connected.append(each))
    error = site.failure("/a.png")
    assert "which is not a public address" in error.fact
    assert (error.code, connected) == ("url", [])


def test_the_connection_uses_the_checked_address(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection resolves a name once, because a second resolution may give another address."""
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    monkeypatch.setattr(urls, "_resolve", lambda *_: answers.pop(0))
    url = site.url("/a.png")
    assert read_item(Item(url, url), site.limits()) == tiny_png(1)
    assert answers == [["10.0.0.1"]]


def test_a_certificate_of_another_host_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "_context", ssl.create_default_context)
    assert "no valid certificate" in site.failure("/a.png").fact


@pytest.mark.parametrize(
    ("answer", "code", "fact"),
    [
        (body(b"", 404), "missing", "does not exist (HTTP 404)"),
        (body(b"", 403), "unreadable", "cannot be fetched (HTTP 403)"),
        (body(b"", 503), "unreadable", "cannot be fetched (HTTP 503)"),
        (body(b"x" * 2_000), "file-too-large", ""),
        (body(b"x", Content_Encoding="gzip"), "unreadable", "the server compresses the image"),
        (body(b"x", Content_Length="5"), "unreadable", "ended after 1 of 5 bytes"),
    ],
)
def test_answers_without_an_image_are_failures(
    site: Site, answer: Answer, code: str, fact: str
) -> None:
    site.answers["/x"] = answer
    error = site.failure("/x", site.limits(max_file_bytes=1_000))
    assert error.code == code
    assert fact in error.fact


def endless(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    with contextlib.suppress(OSError):
        while True:
            request.wfile.write(b"x" * 500)


def dripping(part: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        if part == "body":
            request.send_response(200)
            request.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(100):
                request.wfile.write(b"H")
                time.sleep(0.05)

    return answer


def test_an_endless_body_is_cut_at_the_limit(site: Site) -> None:
    site.answers["/x"] = endless
    assert site.failure("/x", site.limits(max_file_bytes=10_000)).code == "file-too-large"


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_slow_server_times_out(site: Site, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setattr(urls, "MAX_SECONDS", 0.3)
    answer, asked = dripping(part), 0

    def drip(request: BaseHTTPRequestHandler) -> None:
        nonlocal asked
        asked += 1
        answer(request)

    site.answers["/x"] = drip
    begin = time.monotonic()
    assert site.failure("/x").code == "slow"
    assert time.monotonic() - begin < 3
    assert asked == 1


def test_a_transient_fault_is_retried(site: Site) -> None:
    left = [body(b"", 503), body(b"", 429), body(tiny_png(3))]
    site.answers["/x"] = lambda request: left.pop(0)(request)
    url = site.url("/x")
    assert read_item(Item(url, url), site.limits()) == tiny_png(3)


def closed(request: BaseHTTPRequestHandler) -> None:
    """End the connection without an answer."""
    request.close_connection = True


def reset(request: BaseHTTPRequestHandler) -> None:
    """Reset the connection in the body."""
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b"x")
    linger = struct.pack("ii", 1, 0)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.connection.close()


def cut_chunk(request: BaseHTTPRequestHandler) -> None:
    """End the connection inside a chunk."""
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"100\r\nshort")
    request.close_connection = True


def silent(request: BaseHTTPRequestHandler) -> None:
    """Answer too late."""
    time.sleep(0.6)
    request.close_connection = True


@pytest.mark.parametrize("fault", [closed, reset, cut_chunk, silent])
def test_a_broken_connection_is_retried(
    fault: Answer, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "TIMEOUT_S", 0.2)
    left = [fault, body(tiny_png(3))]
    site.answers["/x"] = lambda request: left.pop(0)(request)
    url = site.url("/x")
    assert read_item(Item(url, url), site.limits()) == tiny_png(3)
    assert not left


def test_a_refused_connection_and_a_busy_name_server_are_retried(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    faults = [socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), 111, None]

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        fault = faults.pop(0)
        if isinstance(fault, OSError):
            raise fault
        return ["127.0.0.2"] if fault else ["127.0.0.1"]  # nothing listens at 127.0.0.2

    monkeypatch.setattr(urls, "_resolve", resolve)
    url = site.url("/a.png")
    assert read_item(Item(url, url), site.limits()) == tiny_png(1)
    assert len(asked) == 3
    faults += [socket.gaierror(socket.EAI_NONAME, "Name or service not known")]
    assert "Name or service not known" in str(site.failure("/a.png"))


@pytest.mark.parametrize(
    "hosts", ["https://example.org", "localhost", ["a b.org"], 3, "*", "*.*.org"]
)
def test_invalid_hosts_are_refused(hosts: Any) -> None:
    with pytest.raises(ArgumentError, match=r"names of hosts.*only from public"):
        ImageLimits(allow_urls=hosts)


def test_the_command_takes_hosts(
    site: Site, tmp_path: Path, qwen_vit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.txt").write_text(site.url("/a.png"))
    words = ("export", tmp_path / "list.txt", "--model", "tiny", "--device", "cpu", "--quiet")
    assert qwen_vit(*words, "--out", tmp_path / "none").code == 1
    hosts = f"x.example.org,{HOST}:{site.port}"
    done = qwen_vit(*words, "--out", tmp_path / "out", "--allow-urls", hosts)
    assert done.code == 0, done.err
    assert len(load_features(tmp_path / "out")) == 1


def test_encode_fetches_allowed_addresses(site: Site, tmp_path: Path) -> None:
    """`encode` has the same checks as an export: the host, the resolved address, and the limits."""
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    url, other = site.url("/a.png?size=1"), site.url("/a.png", OTHER)
    site.answers["/a.png?size=1"] = body(tiny_png(1))
    expected = encoder.encode(tiny_png(1))
    [found, failed] = encoder.encode([url, other], limits=site.limits(), on_error="skip")
    assert isinstance(found, ImageFeatures)
    assert isinstance(failed, FailedImage)
    assert (found.id, found.size_px) == (url, (28, 28))
    assert torch.equal(found.embeds, expected.embeds)
    assert failed.error.code == "url"
    assert f"host {OTHER}:{site.port} is not allowed" in failed.error.fact
    assert encoder.encode(url, limits=site.limits(), frames="all")[0].id == url
    with pytest.raises(ImageError, match=r"an address, not a file.*allow_urls"):
        encoder.encode(url)


def test_encode_never_connects_to_a_private_address(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    monkeypatch.setattr(urls, "_is_public", IS_PUBLIC)
    with pytest.raises(ImageError, match="which is not a public address"):
        encoder.encode(site.url("/a.png"), limits=site.limits())


def test_the_encode_command_takes_hosts(
    site: Site, tmp_path: Path, qwen_vit: Callable[..., Any]
) -> None:
    """An address may be in a list or an argument, and the "?" of its query is not a pattern."""
    site.answers["/b.png?size=[1]"] = body(tiny_png(2))
    (tmp_path / "list.txt").write_text(site.url("/a.png"))
    given, out = [tmp_path / "list.txt", site.url("/b.png?size=[1]")], tmp_path / "x.safetensors"
    words = ("encode", *given, "--model", "tiny", "--device", "cpu", "--out", out)
    refused = qwen_vit(*words)
    assert refused.code == 2  # no image is left to write
    assert refused.err.count("--allow-urls HOST to `qwen-vit encode` or `qwen-vit export`") == 2
    done = qwen_vit(*words, "--allow-urls", f"{HOST}:{site.port}", "--overwrite")
    assert done.code == 0, done.err
    assert list(load_features(out).ids) == [site.url("/a.png"), site.url("/b.png?size=[1]")]
    done = qwen_vit(*words, "--allow-urls", "https://no.host/", "--overwrite")
    assert done.code == 2
    assert "--allow-urls contains 'https://no.host/'. Expected names of hosts" in done.err
    assert "without https:// and paths." in done.err


def test_an_export_names_the_option_that_allows_an_address(tmp_path: Path) -> None:
    encoder: Any = FakeEncoder()
    with pytest.raises(ExportError) as caught:
        export_features(encoder, ["https://x.example.org/a.jpg?b"], tmp_path / "out")
    assert "List it in a .txt file" in caught.value.text(in_shell=True)
    assert "--allow-urls" in caught.value.text(in_shell=True)
