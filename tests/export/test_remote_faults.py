"""Test that an export to object storage survives kills, rivals and faults with the same bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.retries.standard import ExponentialBackoff  # type: ignore[import-untyped]

from qwen_vit.common.storage_writes import put_file
from qwen_vit.errors import ExportError
from qwen_vit.export import store_folder
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.options import ExportOptions
from qwen_vit.feature_files.describe import describe_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.verify import verify_features
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.interrupted_exports import Stop
from tests.support.remote_exports import OUT, export, is_put, local, on_host, scratch
from tests.support.s3_server import Request, S3Server


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


def test_a_part_uploads_the_listing_after_another_part_was_killed(
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
def test_an_interrupt_saves_encoded_images(
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
    stored = server.objects("out")
    dry = estimate_export(FakeEncoder(), None, ExportOptions(shard_size=50), folder=OUT)
    found, facts = verify_features(OUT), describe_features(OUT)
    assert dry.saved == found.saved == facts["images_saved"] == first.encoded == 32
    assert dry.to_do == found.to_do == facts["images_to_do"]
    assert server.objects("out") == stored
    second = FakeEncoder()
    export(encoder=second, shard_size=50)
    export("local", shard_size=50)
    assert (first.encoded, second.encoded) == (32, 28)  # the interrupt saved a batch
    assert server.objects("out") == local()


SLOW = [
    pytest.param(each, marks=pytest.mark.slow) for each in ("SlowDown", "InternalError", "slow")
]


@pytest.mark.parametrize("fault", ["cut-put", "lost", *SLOW])
def test_transient_faults_change_no_byte(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)
    met: list[str] = []

    def some(request: Request) -> str | None:
        """Fail the first try of each write, and every tenth other request."""
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
def test_expired_credentials_lose_no_image(server: S3Server, fault: str, fact: str) -> None:
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
    # the first run encoded three shards, and kept the third in the scratch folder
    assert second.encoded == 10 - 9
    assert server.objects("out") == local()
    assert scratch() == []


@pytest.mark.slow
def test_listings_without_the_newest_objects_change_no_byte(server: S3Server) -> None:
    server.hidden = lambda key: "shard-" in key or "export.json" in key
    encoder = FakeEncoder()
    export(encoder=encoder)
    done = export(encoder=encoder)
    assert (encoder.encoded, done.shards_missing) == (10, 0)
    assert server.objects("out") == local()


def test_two_exports_at_the_same_time_repeat_and_tear_no_shard(
    server: S3Server, export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One export begins and finishes after the other export has seen an empty bucket."""
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


def test_an_export_keeps_the_shard_of_another_export(
    server: S3Server, export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both exports encode the same shard, and the bucket keeps the first shard."""
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


def test_parts_that_end_together_write_a_complete_manifest(
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
    export(part=(1, 2))  # the other part has seen only the shards of the first part
    assert server.objects("out") == local()


def test_a_second_writer_on_this_machine_is_refused(server: S3Server) -> None:
    folder = store_folder.as_folder(OUT)
    with folder.hold((1, 1)), pytest.raises(ExportError, match=f"{OUT}: process .* is writing"):
        export()


def test_a_server_that_ignores_conditions_is_an_error(
    server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.ignores_conditions = True
    export()
    assert "has no conditional writes" in caplog.text
    assert server.objects("out") == local()


def test_a_torn_shard_is_written_again(server: S3Server) -> None:
    export()
    shard_bytes = server.objects("out")["shard-00000001.safetensors"]
    server.put("out/shard-00000001.safetensors", shard_bytes[:-9])
    encoder = FakeEncoder()
    export(encoder=encoder)
    assert encoder.encoded == 3
    assert server.objects("out") == local()


@pytest.mark.parametrize("is_cut", [True, False])
def test_lost_settings_are_restored_from_the_shards(server: S3Server, is_cut: bool) -> None:
    export()
    server.delete("out/export.json")
    if is_cut:
        server.put("out/export.json", b"{")
    encoder = FakeEncoder()
    with pytest.raises(ExportError, match=r"which restores export\.json"):
        load_features(OUT)
    export(encoder=encoder)
    assert encoder.encoded == 0
    assert server.objects("out") == local()
    assert scratch() == []
