"""Provide a Hub on loopback, a worker that downloads, and a repository to fill."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_cases import serve
from tests.support.hub_server import Hub, serving
from tests.support.hub_worker import Worker, running_worker


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    with serving({}) as running:
        yield running


@pytest.fixture(scope="session")
def worker(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with running_worker(tmp_path_factory.mktemp("home"), hub.endpoint) as running:
        yield running


@pytest.fixture
def repo(hub: Hub, tmp_path: Path) -> Iterator[Path]:
    """Return the folder of org/tiny, which each test fills. The Hub has no faults at first."""
    folder = tmp_path / "repo"
    serve(hub, "org/tiny", folder)
    yield folder
    hub.faults.clear()
    hub.requests.clear()
    hub.token, hub.redirects = None, False


@pytest.fixture
def call(tmp_path: Path) -> dict[str, Any]:
    """Return the arguments of a call, with a separate cache."""
    return {"model": "org/tiny", "cache_dir": tmp_path / "cache"}
