"""An export into object storage: the bytes of a local one, whatever fails on the way."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.retries.standard import ExponentialBackoff  # type: ignore[import-untyped]

from qwen_vit.common import storage_writes
from qwen_vit.common.storage_writes import put_file
from qwen_vit.errors import ExportError
from qwen_vit.export import store_folder
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.interrupted_exports import Stop
from tests.support.s3_server import BUCKET, Request, S3Server

OUT = f"s3://{BUCKET}/out"


@pytest.fixture
def server(
    running: S3Server, export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[S3Server]:
    """The server, empty and without faults, and a scratch folder of this test."""
    running.fault, running.hidden, running.ignores_conditions = lambda _: None, None, False
    running.delete("out")
    running.requests.clear()
    on_host(monkeypatch, export_dir / "host")
    yield running
    running.fault, running.hidden = lambda _: None, None


def on_host(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Go on as on another machine, which has a scratch folder of its own."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def export(out: str = OUT, *, encoder: Any = None, inputs: Any = ("p",), **options: Any) -> Any:
    more = {name: options.pop(name) for name in ("stop",) if name in options}
    options = {"shard_size": 3, **options}
    return export_features(
        encoder or FakeEncoder(), inputs and list(inputs), out, ExportOptions(**options), **more
    )


def local(folder: str = "local") -> dict[str, bytes]:
    if not Path(folder).exists():
        export(folder)
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def scratch() -> list[str]:
    """What is left on this machine."""
    return [path.name for path in Path(tempfile.gettempdir()).rglob("*") if path.is_file()]


def is_put(request: Request) -> bool:
    return request.method == "PUT" and "shard-" in request.path


# The same as on a disk


def test_it_has_the_bytes_of_a_local_export(server: S3Server) -> None:
    here, done = export("local"), export()
    assert server.objects("out") == local()
    assert (done.exported, done.failed, done.bytes) == (here.exported, here.failed, here.bytes)
    assert str(done.manifest) == f"{OUT}/manifest.parquet"
    assert done.to_json()["folder"] == OUT
    assert scratch() == []


def test_a_second_run_encodes_nothing(server: S3Server) -> None:
    export()
    before, encoder = server.objects("out"), FakeEncoder()
    done = export(encoder=encoder)
    assert (encoder.encoded, done.resumed) == (0, 11)
    assert server.objects("out") == before
    assert scratch() == []


def test_parts_on_machines_of_their_own(
    server: S3Server, export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (3, 1, 2):
        on_host(monkeypatch, export_dir / f"host-{number}")
        done = export(part=(number, 3))
        assert scratch() == []
    assert done.shards_missing == 0
    assert server.objects("out") == local()


def test_large_shards_are_uploaded_in_parts(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_writes, "PART_BYTES", 5 * 2**20)
    path = Path("large")
    path.write_bytes(os.urandom(11 * 2**20))
    storage_writes.put_file(f"{OUT}/large", path, is_new=True)
    assert server.objects("out") == {"large": path.read_bytes()}
    assert len([each for each in server.requests if "partNumber" in each.query]) == 3
    other = Path("other")
    other.write_bytes(os.urandom(11 * 2**20))
    with pytest.raises(FileExistsError):
        storage_writes.put_file(f"{OUT}/large", other, is_new=True)
    server.fail("AccessDenied", 1_000, lambda request: "partNumber=3" in request.query)
    with pytest.raises(OSError, match="AccessDenied"):
        storage_writes.put_file(f"{OUT}/large", other, is_new=False)
    assert server.objects("out") == {"large": path.read_bytes()}


@pytest.mark.slow
def test_growing_and_retrying(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for out in ("local", OUT):
        Path("p/x.png").write_bytes(tiny_png(1)[:50])
        Path("p/n.png").unlink(missing_ok=True)
        export(out)
        Path("p/n.png").write_bytes(tiny_png(40))
        Path("p/x.png").write_bytes(tiny_png(41))
        os.utime("p/x.png", (1, 1))  # no change of time, so --extend leaves it
        export(out, extend=True, inputs=None)
        export(out, retry_failed=True, inputs=None)
    assert {**server.objects("out"), "export.json": b""} == {**local(), "export.json": b""}
    assert "x.png" in load_features(OUT)


@pytest.mark.slow
def test_an_image_that_changed_is_exported_again(server: S3Server) -> None:
    export()
    Path("p/1.png").write_bytes(tiny_png(90))
    os.utime("p/1.png", (2e9, 2e9))
    done = export(extend=True, inputs=None)
    assert done.images == 11
    expected = export("fresh")
    assert expected.images == 11
    assert load_features(OUT)["1.png"].embeds.equal(load_features("fresh")["1.png"].embeds)


@pytest.mark.slow
def test_commands(server: S3Server, qwen_vit: Callable[..., Any]) -> None:
    words = ("p", "--model", "tiny", "--device", "cpu", "--shard-size", "8", "--quiet")
    done = qwen_vit("export", *words, "--out", OUT, "--dry-run")
    assert done.code == 0, done.err
    assert "in the store" in done.out
    assert server.objects("out") == {}
    done = qwen_vit("export", *words, "--out", OUT, "--allow-failed", "1")
    assert done.code == 0, done.err
    assert f"wrote {OUT}/manifest.parquet" in done.out
    done = qwen_vit("export", "--resume", OUT, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["resumed"] == 11
    assert qwen_vit("verify", OUT).code == 0
    assert json.loads(qwen_vit("info", OUT, "--json").out)["images_done"] == 10


# Kills, rivals and faults


@pytest.mark.parametrize(
    "name", ["listing.jsonl", "shard-00000002.safetensors", "manifest.parquet"]
)
@pytest.mark.parametrize("is_uploaded", [True, False])
def test_a_kill_around_an_upload_loses_nothing(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, name: str, is_uploaded: bool
) -> None:
    class Killed(BaseException):
        pass

    def dying(publish: Callable[..., None]) -> Callable[..., None]:
        def wrapped(self: Any, found: str, *arguments: Any, **options: Any) -> None:
            if found != name or is_uploaded:
                publish(self, found, *arguments, **options)
            if found == name:
                raise Killed

        return wrapped

    kind = store_folder.StoreFolder
    with monkeypatch.context() as patch:
        patch.setattr(kind, "publish", dying(kind.publish))
        patch.setattr(kind, "publish_version", dying(kind.publish_version))
        with pytest.raises(Killed):
            export()
    encoder = FakeEncoder()
    export(encoder=encoder)
    expected = {"listing.jsonl": 10, "manifest.parquet": 0}
    assert encoder.encoded == expected.get(name, 1)
    assert server.objects("out") == local()
    assert scratch() == []


def test_a_part_uploads_the_listing_that_a_killed_one_did_not(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_folder.StoreFolder, "publish", None)
        patch.setattr(store_folder.StoreFolder, "_clean_up", lambda *_: None)
        with pytest.raises(TypeError):
            export(part=(1, 2))
    assert set(server.objects("out")) == {"export.json"}
    for number in (1, 2):
        export(part=(number, 2))
    assert server.objects("out") == local()


@pytest.mark.parametrize("same_host", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_interrupt_keeps_what_was_encoded(
    server: S3Server, export_dir: Path, monkeypatch: pytest.MonkeyPatch, same_host: bool
) -> None:
    for number in range(10, 60):
        Path(f"p/{number}.png").write_bytes(tiny_png(number))
    first = FakeEncoder()
    with pytest.raises(KeyboardInterrupt):
        export(encoder=first, shard_size=50, stop=Stop(45))
    assert any(name.startswith("segment-") for name in server.objects("out"))
    if not same_host:
        on_host(monkeypatch, export_dir / "other")
    second = FakeEncoder()
    export(encoder=second, shard_size=50)
    export("local", shard_size=50)
    assert (first.encoded, second.encoded) == (32, 28)  # a batch was kept
    assert server.objects("out") == local()


SLOW = [
    pytest.param(each, marks=pytest.mark.slow) for each in ("SlowDown", "InternalError", "slow")
]


@pytest.mark.parametrize("fault", ["cut-put", "lost", *SLOW])
def test_a_passing_fault_changes_nothing(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)
    met: list[str] = []

    def some(request: Request) -> str | None:
        """Each write fails once, and every tenth other request."""
        name = f"{request.method} {request.path}"
        if (request.method == "PUT" and name not in met) or len(server.requests) % 10 == 0:
            met.append(name)
            return fault
        return None

    server.fault = some
    export()
    assert len(met) >= 8
    assert server.objects("out") == local()
    assert scratch() == []


@pytest.mark.parametrize(
    ("fault", "fact"),
    [
        ("ExpiredToken", "the credentials have expired"),
        pytest.param("AccessDenied", "access is denied", marks=pytest.mark.slow),
    ],
)
def test_credentials_that_expire_lose_nothing(server: S3Server, fault: str, fact: str) -> None:
    puts: list[str] = []

    def expired(request: Request) -> str | None:
        puts.extend([request.path] if is_put(request) else [])
        return fault if len(puts) > 2 else None

    server.fault, first = expired, FakeEncoder()
    with pytest.raises(ExportError) as caught:
        export(encoder=first)
    assert fact in caught.value.fact
    assert caught.value.name.startswith(OUT)
    server.fault, second = lambda _: None, FakeEncoder()
    export(encoder=second)
    assert second.encoded == 10 - 9  # three shards were encoded, and the third waited here
    assert server.objects("out") == local()
    assert scratch() == []


@pytest.mark.slow
def test_listings_that_omit_the_newest_objects(server: S3Server) -> None:
    server.hidden = lambda key: "shard-" in key or "export.json" in key
    encoder = FakeEncoder()
    export(encoder=encoder)
    done = export(encoder=encoder)
    assert (encoder.encoded, done.shards_missing) == (10, 0)
    assert server.objects("out") == local()


def test_rivals_on_two_machines_double_and_tear_nothing(
    server: S3Server, export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One begins and finishes while the other has seen an empty bucket."""
    freeze = store_folder.StoreFolder.check

    def with_rival(self: Any, *arguments: Any, **options: Any) -> None:
        freeze(self, *arguments, **options)
        monkeypatch.setattr(store_folder.StoreFolder, "check", freeze)
        with monkeypatch.context() as patch:
            on_host(patch, export_dir / "rival")
            export()

    monkeypatch.setattr(store_folder.StoreFolder, "check", with_rival)
    done = export()
    assert done.resumed == 11
    assert server.objects("out") == local()


def test_a_rival_between_a_look_and_a_put(
    server: S3Server, export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both encode the same shard; the first that is there stays."""
    put, rival = put_file, FakeEncoder()

    def with_rival(address: str, path: Path, *, is_new: bool) -> None:
        if "shard-" in address and not rival.encoded:
            with monkeypatch.context() as patch:
                patch.setattr(store_folder, "put_file", put)
                on_host(patch, export_dir / "rival")
                export(encoder=rival)
        put(address, path, is_new=is_new)

    monkeypatch.setattr(store_folder, "put_file", with_rival)
    export()
    assert server.objects("out") == local()
    conditions = {each.condition for each in server.requests if is_put(each)}
    assert conditions == {"*"}


def test_manifests_of_parts_that_end_together(
    server: S3Server, export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(part=(1, 2))
    written = store_folder.StoreFolder.publish_version

    def with_rival(self: Any, *arguments: Any) -> None:
        monkeypatch.setattr(store_folder.StoreFolder, "publish_version", written)
        with monkeypatch.context() as patch:
            on_host(patch, export_dir / "rival")
            export(part=(2, 2))
        written(self, *arguments)

    monkeypatch.setattr(store_folder.StoreFolder, "publish_version", with_rival)
    export(part=(1, 2))  # has seen the shards of the first part only
    assert server.objects("out") == local()


def test_a_second_writer_here_is_refused(server: S3Server) -> None:
    folder = store_folder.as_folder(OUT)
    with folder.hold((1, 1)), pytest.raises(ExportError, match=f"{OUT}: process .* is writing"):
        export()


def test_a_server_without_conditions_is_named(
    server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.ignores_conditions = True
    export()
    assert "has no conditional writes" in caplog.text
    assert server.objects("out") == local()


def test_a_torn_shard_is_made_again(server: S3Server) -> None:
    export()
    whole = server.objects("out")["shard-00000001.safetensors"]
    server.put("out/shard-00000001.safetensors", whole[:-9])
    encoder = FakeEncoder()
    export(encoder=encoder)
    assert encoder.encoded == 3
    assert server.objects("out") == local()


@pytest.mark.slow
def test_an_image_that_works_now_replaces_its_shard(server: S3Server) -> None:
    Path("p/3.png").rename("away")
    Path("p/3.png").mkdir()  # unreadable
    Path("list.txt").write_text("\n".join(f"p/{number}.png" for number in range(10)))
    Path("p/3.png").rmdir()
    export(inputs=("list.txt",))
    Path("away").rename("p/3.png")
    done = export(inputs=("list.txt",))
    assert (done.exported, done.failed) == (10, {})
    assert "p/3.png" in load_features(OUT)


# What is refused


@pytest.mark.parametrize(
    ("out", "fact", "remedy"),
    [
        ("s3://no-such-bucket/out", "its bucket does not exist", "check the address"),
        (
            f"s3://{BUCKET}/strange",
            "the folder contains notes.txt (1 in all) and no export.json",
            "another",
        ),
        (f"s3://{BUCKET}/strange/notes.txt", "not a folder", "pass another folder"),
        ("hf://datasets/a/b", "git commits", "hf upload"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named(
    server: S3Server, out: str, fact: str, remedy: str
) -> None:
    server.put("strange/notes.txt", b"text")
    encoder = FakeEncoder()
    with pytest.raises(ExportError) as caught:
        export(out, encoder=encoder)
    assert fact in caught.value.fact
    assert remedy in caught.value.remedy
    assert encoder.encoded == 0


def test_other_settings_and_inputs_are_refused(server: S3Server) -> None:
    export()
    with pytest.raises(ExportError, match="output was merged, is mean now"):
        export(output="mean")
    Path("p/new.png").write_bytes(tiny_png(50))
    with pytest.raises(ExportError, match=r"1 new, first new\.png"):
        export()
    with pytest.raises(ExportError, match="no export to resume"):
        export(f"s3://{BUCKET}/none", inputs=None)


def test_denied_writes_are_an_error_before_any_work(server: S3Server) -> None:
    server.fail("AccessDenied", 1_000, lambda request: request.method == "PUT")
    encoder = FakeEncoder()
    with pytest.raises(ExportError, match="access is denied"):
        export(encoder=encoder)
    assert encoder.encoded == 0


def test_other_commands_refuse_an_address(server: S3Server, qwen_vit: Callable[..., Any]) -> None:
    done = qwen_vit("encode", "p/1.png", "--model", "tiny", "--out", f"{OUT}.safetensors")
    assert done.code == 2
    assert "is an address. Pass a path on this machine" in done.err
