"""Test that readers fetch ranges from object storage: headers first, then the requested rows."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.common import store_cache
from qwen_vit.common.storage import storage_errors
from qwen_vit.common.store_cache import CACHE_VARIABLE
from qwen_vit.common.store_path import StorePath
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.file import FeatureFile
from qwen_vit.feature_files.read import FeatureFolder, load_features
from qwen_vit.feature_files.verify import verify_features
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.s3_server import BUCKET, S3Server

OUT = f"s3://{BUCKET}/out"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an export of 23 good images and a broken image in shards of five, with layers."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "p").mkdir()
    for number in range(24):
        data = tiny_png(number)
        (folder / f"p/{number:02}.png").write_bytes(data[:50] if number == 7 else data)
    encoder: Any = FakeEncoder()
    options = ExportOptions(shard_size=5, layers=(1, 3))
    export_features(encoder, [folder / "p"], folder / "out", options)
    return folder / "out"


@pytest.fixture
def server(running: S3Server, local: Path) -> S3Server:
    """Return the server with the export and without faults."""
    running.fault = lambda _: None
    running.put_folder(local, "out")
    running.requests.clear()
    return running


def check_same(found: Any, expected: Any) -> None:
    assert (found.id, found.grid_thw, found.size_px) == (
        expected.id, expected.grid_thw, expected.size_px,
    )  # fmt: skip
    assert found.embeds.equal(expected.embeds)
    assert found.layers.keys() == expected.layers.keys()
    for block, rows in found.layers.items():
        assert rows.equal(expected.layers[block])


def test_a_remote_folder_equals_the_local_folder(server: S3Server, local: Path) -> None:
    remote, here = load_features(OUT), load_features(local)
    assert isinstance(remote, FeatureFolder)
    assert remote.is_complete
    assert (str(remote), len(remote), list(remote.ids)) == (OUT, 23, list(here.ids))
    assert [each.id for each in remote.errors] == ["07.png"]
    for found, expected in zip(remote, here, strict=True):
        check_same(found, expected)
    check_same(remote["11.png"], here["11.png"])
    check_same(remote[-1], here[-1])
    assert "07.png" not in remote
    assert remote.metadata == here.metadata


def test_a_remote_file_equals_the_local_file(server: S3Server, local: Path) -> None:
    name = "shard-00000002.safetensors"
    remote, here = load_features(f"{OUT}/{name}"), load_features(local / name)
    assert isinstance(remote, FeatureFile)
    for found, expected in zip(remote, here, strict=True):
        check_same(found, expected)


def test_opening_reads_the_listing_and_no_shard(server: S3Server, local: Path) -> None:
    load_features(OUT)
    sizes = [(local / name).stat().st_size for name in ("export.json", "listing.jsonl")]
    assert server.sent == sum(sizes)


def test_reading_rows_transfers_exactly_their_bytes(server: S3Server, local: Path) -> None:
    remote = load_features(OUT)
    assert len(remote) == 23  # this reads every shard's header
    server.requests.clear()
    chosen = random.Random(0).sample(list(remote.ids), 9)
    read = [remote[name] for name in chosen]
    n_bytes = sum(rows.nbytes for each in read for rows in (each.embeds, *each.layers.values()))
    assert server.sent == n_bytes
    assert [request.method for request in server.requests] == ["GET"] * 3 * len(chosen)


def test_a_header_is_read_once(server: S3Server, local: Path) -> None:
    remote = load_features(OUT)
    server.requests.clear()
    for _ in range(3):
        check_same(remote["20.png"], load_features(local)["20.png"])
    headers = [each for each in server.requests if each.range == "bytes=0-7"]
    assert len(headers) == 1


@pytest.mark.parametrize("fault", ["SlowDown", "InternalError", "cut", "slow"])
def test_transient_faults_change_no_row(server: S3Server, local: Path, fault: str) -> None:
    server.fail(fault, 2)
    remote = load_features(OUT)
    server.fail(fault, 2)
    check_same(remote["03.png"], load_features(local)["03.png"])


@pytest.mark.parametrize(
    ("fault", "fact"),
    [
        ("ExpiredToken", "the credentials have expired; renew them"),
        ("AccessDenied", "access is denied"),
    ],
)
def test_a_lasting_fault_is_named(server: S3Server, fault: str, fact: str) -> None:
    remote = load_features(OUT)
    server.fail(fault, 100)
    with pytest.raises(ExportError) as caught:
        _ = remote["03.png"]
    assert fact in str(caught.value)
    with pytest.raises(ExportError) as caught:
        load_features(f"{OUT}/shard-00000002.safetensors")
    assert fact in str(caught.value)


def test_a_replaced_shard_is_an_error(server: S3Server, local: Path) -> None:
    remote = load_features(OUT)
    assert remote["03.png"].id == "03.png"
    name = "shard-00000000.safetensors"
    server.put(f"out/{name}", (local / name).read_bytes() + b"\0")
    with pytest.raises(ExportError, match="was replaced after the listing"):
        _ = remote["04.png"]


def test_an_incomplete_remote_folder_is_read(server: S3Server, local: Path) -> None:
    for name in ("export.json", "listing.jsonl", "shard-00000001.safetensors"):
        server.put(f"part/{name}", (local / name).read_bytes())
    part = load_features(f"s3://{BUCKET}/part")
    assert not part.is_complete
    assert list(part.ids) == ["05.png", "06.png", "08.png", "09.png"]


@pytest.mark.parametrize(
    ("address", "fact"),
    [
        (f"s3://{BUCKET}/none", "does not exist"),
        (f"s3://{BUCKET}/none.safetensors", "does not exist"),
        ("s3://no-such-bucket/out", "does not exist"),
        (f"s3://{BUCKET}", "a folder without export.json"),
        (f"{OUT}/export.json", "not a safetensors file"),
    ],
)
def test_an_address_without_features_is_named(server: S3Server, address: str, fact: str) -> None:
    with pytest.raises(ExportError, match=fact):
        load_features(address)
    with pytest.raises(ArgumentError):
        load_features(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [3, 40, 4_000, -1])
def test_a_torn_shard_is_named(server: S3Server, local: Path, cut: int) -> None:
    data = (local / "shard-00000000.safetensors").read_bytes()
    server.put("torn/a.safetensors", data[:cut])
    with pytest.raises(ExportError, match="truncated, or not a safetensors file"):
        load_features(f"s3://{BUCKET}/torn/a.safetensors")


def test_features_survive_pickling_and_are_verified(server: S3Server, local: Path) -> None:
    remote = load_features(OUT)
    check_same(pickle.loads(pickle.dumps(remote))["05.png"], remote["05.png"])
    found = verify_features(OUT)
    assert (found.images, found.problems) == (23, ())


def test_tables_of_remote_features(server: S3Server, local: Path) -> None:
    remote, here = load_features(OUT)[:4], load_features(local)[:4]
    for one, other in zip(remote.to_pandas().embeds, here.to_pandas().embeds, strict=True):
        assert one.tolist() == other.tolist()


def test_commands_read_an_address(server: S3Server, qwen_vit: Callable[..., Any]) -> None:
    done = qwen_vit("verify", OUT)
    assert done.code == 0, done.err
    done = qwen_vit("info", OUT, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["images_done"] == 23


# A cache on this machine's disk


def objects_sent(server: S3Server) -> int:
    """Return the requests for objects' bytes since the last call."""
    count = sum(each.method == "GET" and not each.query for each in server.requests)
    server.requests.clear()
    return count


def test_a_cache_serves_repeated_reads(
    server: S3Server, tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argument or the environment names the cache, also in another process."""
    here, names = load_features(local), ("03.png", "20.png", "11.png")
    for name in names:
        check_same(load_features(OUT, cache_dir=tmp_path / "c")[name], here[name])
    assert objects_sent(server) > 0
    again = pickle.loads(pickle.dumps(load_features(OUT, cache_dir=tmp_path / "c")))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "c"))
    for remote in (again, load_features(OUT)):
        for name in names:
            check_same(remote[name], here[name])
    assert objects_sent(server) == 0
    check_same(load_features(OUT)["04.png"], here["04.png"])
    assert objects_sent(server) == 3  # the rows of the output, and of two layers


def test_without_a_cache_no_file_is_written(server: S3Server, tmp_path: Path) -> None:
    for _ in range(2):
        _ = load_features(OUT)["03.png"]
        assert objects_sent(server) > 3


def test_a_cache_never_returns_a_replaced_object(server: S3Server, tmp_path: Path) -> None:
    """The name of a cached range has the ETag, so a new object of the same size is read again."""
    address, cache = f"s3://{BUCKET}/x.bin", tmp_path / "c"
    for data in (b"one", b"two", b"one"):
        server.put("x.bin", data)
        assert StorePath(address, cache=cache).read_bytes() == data
    before = StorePath(address, cache=cache)
    assert before.read(0, 2) == b"on"
    server.put("x.bin", b"six")
    assert before.read(0, 2) == b"on"  # the version at the time of opening
    with pytest.raises(OSError, match="was replaced"):
        before.read(1, 3)
    assert StorePath(address, cache=cache).read(0, 2) == b"si"


def test_an_unwritable_cache_is_one_warning(
    server: S3Server, tmp_path: Path, local: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "c").write_text("no folder")
    remote = load_features(OUT, cache_dir=tmp_path / "c")
    for name in ("03.png", "04.png"):
        check_same(remote[name], load_features(local)[name])
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert "could not store bytes: Not a directory; check the folder" in caplog.text


def test_a_wrong_variable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "c"))
    store_cache._warn.cache_clear()
    store_cache._warn(tmp_path / "c", "Not a directory")
    assert "check QWEN_VIT_STORE_CACHE" in caplog.text
    unreachable = OSError('Could not connect to the endpoint URL: "http://s3.wrong/b"')
    assert storage_errors(unreachable)[1] == "try again later"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.wrong")
    assert storage_errors(unreachable)[1] == "check AWS_ENDPOINT_URL"


def test_damage_in_a_cache_is_found(server: S3Server, tmp_path: Path, local: Path) -> None:
    """A torn file is read again. verify=True finds a wrong bit, and `verify` reads the store."""
    cache = tmp_path / "c"
    expected = load_features(OUT, cache_dir=cache)["03.png"]
    kept = [path for path in cache.rglob("*") if path.is_file()]
    rows = [path for path in kept if path.read_bytes() == expected.embeds.numpy().tobytes()]
    assert len(rows) == 1
    data = rows[0].read_bytes()
    rows[0].write_bytes(data[:-1])
    check_same(load_features(OUT, cache_dir=cache)["03.png"], expected)
    assert rows[0].read_bytes() == data
    rows[0].write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ExportError, match="changed after it was written"):
        _ = load_features(OUT, cache_dir=cache, verify=True)["03.png"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(cache))
        assert verify_features(OUT).problems == ()
