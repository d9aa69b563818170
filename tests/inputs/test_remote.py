"""Test inputs in object storage, on an S3 server with injected faults."""

import io
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.common import storage
from qwen_vit.common.installation import install_command
from qwen_vit.common.store_cache import CACHE_VARIABLE
from qwen_vit.errors import ExportError
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs import parquet_rows as parquet_module
from qwen_vit.inputs import read as read_module
from qwen_vit.inputs.find import check_inputs, find_items
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.parquet import ParquetColumns
from qwen_vit.inputs.read import read_item
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.inputs import failure
from tests.support.parquet_files import structs, write_rows
from tests.support.s3_server import BUCKET, Request, S3Server

LIMITS, ROOT = ImageLimits(), f"s3://{BUCKET}"


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Return the server without faults, with retries that do not wait, and without open readers."""
    monkeypatch.setattr(parquet_module, "_READERS", parquet_module._Readers())
    running.fault, running.page_keys = lambda _: None, 0
    running.requests.clear()
    monkeypatch.setattr(read_module, "PAUSES_S", (0, 0))
    return running


@pytest.fixture
def data(tmp_path: Path, server: S3Server) -> Path:
    """Make a folder of images in files, a tar and a Parquet file, and copy it to the bucket."""
    folder = tmp_path / "p"
    (folder / "a/b").mkdir(parents=True)
    for number, name in enumerate(("0.png", "a/1.png", "a/b/2.png", "z é+%.png")):
        (folder / name).write_bytes(tiny_png(number))
    (folder / "a/notes.md").write_text("no image")
    (folder / "broken.png").write_bytes(tiny_png(9)[:50])
    with tarfile.open(folder / "t.tar", "w") as tar:
        for number in (4, 5, 6):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(tiny_png(number))
            tar.addfile(info, io.BytesIO(tiny_png(number)))
    write_rows(folder / "x.parquet", structs(range(7, 12)), group=2)
    server.put_folder(folder, "p")
    return folder


def items(*inputs: str, column: str | None = None) -> list[Item]:
    return list(find_items(inputs, columns=ParquetColumns.of(column, None)))


def refused(*inputs: str) -> ExportError:
    with pytest.raises(ExportError) as caught:
        items(*inputs)
    return caught.value


def test_a_prefix_is_listed_like_a_folder(data: Path, server: S3Server) -> None:
    server.page_keys = 2
    left_out: Counter[str] = Counter()
    local = items(str(data), column="image")
    for address in (f"{ROOT}/p", f"{ROOT}/p/", f"{ROOT}//p"):
        left_out.clear()
        remote = list(find_items([address], left_out, columns=ParquetColumns("image")))
        assert [item.id for item in remote] == [item.id for item in local]
        assert left_out == {".md": 1}
    assert all(item.version for item in remote)
    assert [read_item(item, LIMITS) for item in remote] == [
        read_item(item, LIMITS) for item in local
    ]
    assert "p/0.png" in {item.id for item in items(ROOT)}


def test_objects_patterns_and_lists_are_inputs(data: Path, server: S3Server) -> None:
    assert [item.id for item in items(f"{ROOT}/p/0.png")] == [f"{ROOT}/p/0.png"]
    assert [item.id for item in items(f"{ROOT}/p/*.png")] == [
        f"{ROOT}/p/0.png", f"{ROOT}/p/broken.png", f"{ROOT}/p/z é+%.png",
    ]  # fmt: skip
    assert len(items(f"{ROOT}/p/**/*.png")) == 5
    assert [item.id for item in items(f"{ROOT}/p/t.tar")] == [f"t.tar/{n}.png" for n in (4, 5, 6)]
    server.put("lists/l.txt", f"../p/0.png\n{ROOT}/p/a/1.png\n".encode())
    first, second = items(f"{ROOT}/lists/l.txt")
    assert (first.id, first.source) == ("../p/0.png", f"{ROOT}/p/0.png")
    assert [read_item(each, LIMITS) for each in (first, second)] == [tiny_png(0), tiny_png(1)]
    server.put("lists/l.jsonl", b'{"id": "x", "path": "../p/a/1.png"}\n')
    [item] = items(f"{ROOT}/lists/l.jsonl")
    assert (item.id, read_item(item, LIMITS)) == ("x", tiny_png(1))


def test_an_image_costs_one_request(data: Path, server: S3Server) -> None:
    found = items(f"{ROOT}/p/*.png")
    server.requests.clear()
    for item in found:
        read_item(item, LIMITS)
    assert [request.method for request in server.requests] == ["GET"] * len(found)
    assert server.sent == sum(item.size or 0 for item in found)


def test_a_tar_and_a_parquet_file_are_listed_from_their_headers(
    tmp_path: Path, server: S3Server
) -> None:
    path = tmp_path / "big.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = 2**20
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    server.put("big/big.tar", path.read_bytes())
    assert len(items(f"{ROOT}/big/big.tar")) == 4
    print(f"a tar of 4 MiB: {server.sent:,} bytes in {len(server.requests)} requests")
    assert server.sent < 2**20


def test_a_listing_is_read_page_by_page(server: S3Server) -> None:
    for number in range(7):
        server.put(f"many/{number}.png", tiny_png(number))
    server.page_keys = 2
    found = storage.list_objects(f"{ROOT}/many/")
    assert next(found).address == f"{ROOT}/many/0.png"
    assert len(server.requests) == 1
    assert len(list(found)) == 6
    assert len(server.requests) == 4


def test_a_cache_keeps_images(
    data: Path, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects and members of tars. A new listing has the new version of a replaced object."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    found = items(f"{ROOT}/p/0.png") + items(f"{ROOT}/p/t.tar")
    first = [read_item(item, LIMITS) for item in found]
    server.requests.clear()
    assert [read_item(item, LIMITS) for item in found] == first
    assert server.requests == []
    server.put("p/0.png", tiny_png(50))
    assert read_item(found[0], LIMITS) == tiny_png(0)  # the listed version
    assert read_item(items(f"{ROOT}/p/0.png")[0], LIMITS) == tiny_png(50)
    monkeypatch.delenv(CACHE_VARIABLE)
    assert failure(found[0]).code == "changed"


# An export


def export(inputs: list[str], out: Path, **options: Any) -> Any:
    encoder: Any = FakeEncoder()
    return export_features(
        encoder, inputs, out, ExportOptions(shard_size=4, column="image", **options)
    )


def rows(folder: Path) -> dict[str, bytes]:
    return {each.id: each.embeds.numpy().tobytes() for each in load_features(folder)}


def test_an_export_has_the_features_of_the_local_files(data: Path, tmp_path: Path) -> None:
    local, remote = export([str(data)], tmp_path / "l"), export([f"{ROOT}/p"], tmp_path / "r")
    assert (
        (remote.exported, remote.failed) == (local.exported, local.failed) == (12, {"truncated": 1})
    )
    assert rows(tmp_path / "r") == rows(tmp_path / "l")


def test_parts_and_resuming_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    def shards(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.glob("shard-*")}

    export([f"{ROOT}/p"], tmp_path / "whole")
    for number in (2, 1):
        export([f"{ROOT}/p"], tmp_path / "parts", part=(number, 2))
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")
    (tmp_path / "parts/shard-00000001.safetensors").unlink()
    export([str(tmp_path / "parts/listing.jsonl")], tmp_path / "parts")
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")


def test_resuming_names_a_replaced_object(data: Path, server: S3Server, tmp_path: Path) -> None:
    export([f"{ROOT}/p"], tmp_path / "out")
    server.put("p/a/1.png", tiny_png(77))
    with pytest.raises(ExportError, match=r"1 changed, first a/1\.png"):
        export([f"{ROOT}/p"], tmp_path / "out")


def test_a_replaced_object_of_another_size_is_not_a_moved_object(
    data: Path, server: S3Server, tmp_path: Path
) -> None:
    """`--extend` once took the new size for a moved object, and refused it."""
    export([f"{ROOT}/p"], tmp_path / "out")
    image = tiny_png(2) + bytes(100)
    server.put("p/a/1.png", image)
    done = export([f"{ROOT}/p"], tmp_path / "out", extend=True)
    assert done.exported == 12
    assert rows(tmp_path / "out")["a/1.png"] == rows(tmp_path / "out")["a/b/2.png"]


def test_an_estimate_reads_headers(data: Path, server: S3Server) -> None:
    encoder: Any = FakeEncoder()
    found = estimate_export(encoder, [f"{ROOT}/p"], ExportOptions(column="image"))
    assert (found.images, found.unreadable) == (13, 0)


def test_commands_read_a_bucket(data: Path, tmp_path: Path, qwen_vit: Callable[..., Any]) -> None:
    out = tmp_path / "x.safetensors"
    done = qwen_vit("encode", f"{ROOT}/p/a", "--model", "tiny", "--device", "cpu", "--out", out)
    assert done.code == 0, done.err
    assert list(load_features(out).ids) == ["1.png", "b/2.png"]


# Faults


def is_object(request: Request) -> bool:
    return request.method == "GET" and not request.query


PASSING = ["SlowDown", "InternalError", "ServiceUnavailable", "cut", "slow"]


@pytest.mark.parametrize("fault", PASSING)
def test_transient_faults_lose_no_image(data: Path, server: S3Server, fault: str) -> None:
    found = items(f"{ROOT}/p", column="image")
    server.fail(fault, 2, is_object)
    assert len({read_item(item, LIMITS) for item in found}) == len(found)
    server.fail(fault, 1)  # the fault hits the listing
    assert items(f"{ROOT}/p", column="image") == found


@pytest.mark.parametrize(
    ("fault", "fact", "remedy"),
    [
        ("AccessDenied", "access is denied", "credentials and the bucket's policy"),
        ("ExpiredToken", "the credentials have expired", "Renew them"),
        ("InvalidAccessKeyId", "access is denied", "credentials"),
        ("NoSuchBucket", "its bucket does not exist", "Check the address"),
        ("NoSuchKey", "does not exist", "Check the address"),
    ],
)
def test_a_lasting_fault_has_a_name_and_a_remedy(
    data: Path, server: S3Server, fault: str, fact: str, remedy: str
) -> None:
    plain, row = items(f"{ROOT}/p/0.png")[0], items(f"{ROOT}/p/x.parquet", column="image")[0]
    server.fail(fault, 100)
    for item in (plain, row):
        error = failure(item)
        assert fact in str(error)
        assert remedy in error.remedy
        assert error.code in ("unreadable", "missing")
    if fault != "NoSuchKey":
        for given in (f"{ROOT}/p/*.png", f"{ROOT}/p/l.txt"):
            refusal = refused(given)
            assert fact in refusal.fact
            assert remedy in refusal.remedy


def test_an_unavailable_server_is_one_failure(data: Path, server: S3Server) -> None:
    [item] = items(f"{ROOT}/p/0.png")
    server.fail("cut", 1_000)
    error = failure(item)
    assert error.code == "unreadable"
    assert error.remedy == "Try again later."


def test_an_object_replaced_after_the_listing_is_not_read(data: Path, server: S3Server) -> None:
    [file], tar = items(f"{ROOT}/p/0.png"), items(f"{ROOT}/p/t.tar")
    parquet = items(f"{ROOT}/p/x.parquet", column="image")
    server.put("p/0.png", tiny_png(50))
    server.put("p/t.tar", (data / "t.tar").read_bytes() + bytes(512))
    write_rows(data / "x.parquet", structs(range(20, 25)), group=2)
    server.put("p/x.parquet", (data / "x.parquet").read_bytes())
    for item in (file, tar[1], parquet[2]):
        error = failure(item)
        assert error.code == "changed"
        assert "replaced after the listing" in error.fact


def test_missing_addresses_are_refused_before_any_work(data: Path, server: S3Server) -> None:
    for address in (f"{ROOT}/none.png", f"{ROOT}/none/", "s3://no-such-bucket/x"):
        error = refused(address)
        assert "does not exist" in error.fact
        with pytest.raises(ExportError):
            check_inputs([address])
    assert refused(f"{ROOT}/p/*.bmp").fact == "no object matches"
    assert "its bucket" in refused("s3://no-such-bucket/p/*.png").fact


def test_the_error_of_a_store_names_its_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    storage._filesystem.cache_clear()
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert install_command("s3") in refused("s3://bucket/a.png").remedy
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert install_command("gs") in refused("gs://bucket/a.png").remedy
    storage._filesystem.cache_clear()
