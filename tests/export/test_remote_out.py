"""Test that an export to object storage has the bytes of a local export."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.common import storage_writes
from qwen_vit.errors import ExportError
from qwen_vit.feature_files.read import load_features
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.remote_exports import OUT, export, local, on_host, scratch
from tests.support.s3_server import BUCKET, S3Server


def test_a_remote_export_has_the_bytes_of_a_local_export(server: S3Server) -> None:
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


def test_parts_on_separate_machines_equal_one_export(
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
def test_a_remote_export_grows_and_retries(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in ("local", OUT):
        Path("p/x.png").write_bytes(tiny_png(1)[:50])
        Path("p/n.png").unlink(missing_ok=True)
        export(out)
        Path("p/n.png").write_bytes(tiny_png(40))
        Path("p/x.png").write_bytes(tiny_png(41))
        os.utime("p/x.png", (1, 1))  # the time is unchanged, so --extend keeps the image
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
def test_commands_write_to_an_address(server: S3Server, qwen_vit: Callable[..., Any]) -> None:
    words = ("p", "--model", "tiny", "--device", "cpu", "--shard-size", "8", "--quiet")
    done = qwen_vit("export", *words, "--out", OUT, "--dry-run")
    assert done.code == 0, done.err
    assert "in the store" in done.out
    assert server.objects("out") == {}
    done = qwen_vit("export", *words, "--out", OUT, "--allow-failed", "1")
    assert done.code == 0, done.err
    assert f"manifest: {OUT}/manifest.parquet" in done.out
    done = qwen_vit("export", "--resume", OUT, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["resumed"] == 11
    assert qwen_vit("verify", OUT).code == 0
    assert json.loads(qwen_vit("info", OUT, "--json").out)["images_done"] == 10


@pytest.mark.slow
def test_a_repaired_image_replaces_its_shard(server: S3Server) -> None:
    Path("p/3.png").rename("away")
    Path("p/3.png").mkdir()  # an unreadable image
    Path("list.txt").write_text("\n".join(f"p/{number}.png" for number in range(10)))
    Path("p/3.png").rmdir()
    export(inputs=("list.txt",))
    Path("away").rename("p/3.png")
    done = export(inputs=("list.txt",))
    assert (done.exported, done.failed) == (10, {})
    assert "p/3.png" in load_features(OUT)


@pytest.mark.parametrize(
    ("out", "fact", "remedy"),
    [
        ("s3://no-such-bucket/out", "its bucket does not exist", "Check the address"),
        (
            f"s3://{BUCKET}/strange",
            "the folder contains notes.txt (1 in all) and no export.json",
            "another",
        ),
        (f"s3://{BUCKET}/strange/notes.txt", "not a folder", "Pass another folder"),
        ("hf://datasets/a/b", "git commits", "hf upload"),
    ],
)
def test_an_unwritable_address_is_named(server: S3Server, out: str, fact: str, remedy: str) -> None:
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
    done = qwen_vit("export", "p/1.png", "--model", "tiny", "--out", "https://host/out")
    assert done.code == 2
    assert "or an address such as s3://BUCKET/NAME" in done.err
