"""Test the pip command in the remedies of errors."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.common import installation
from qwen_vit.common.installation import install_command
from tests.support import ROOT

REQUIRES = (
    "torch>=2.11", "jinja2>=3.1; extra == 'show'", "matplotlib>=3.9; extra == 'show'",
    "transformers>=5.18; extra == 'hf'",
)  # fmt: skip


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that the package is installed from an address, with pip beside this Python."""
    monkeypatch.setattr(installation, "CHECKOUT", tmp_path)
    monkeypatch.setattr(installation, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(shutil, "which", lambda _: f"{Path(sys.executable).parent}/pip")

    class Installed:
        def __init__(self, source: dict[str, Any] | None) -> None:
            self.source = source
            monkeypatch.setattr(installation, "distribution", lambda name: self)

        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if self.source is None else json.dumps(self.source)

    return Installed


def test_a_checkout_is_installed_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Any
) -> None:
    """The remedy once named qwen-vit[hf], which no package index has."""
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    assert install_command("hf") == "pip install -e '.[hf]'"
    assert install_command() == "pip install -e ."
    monkeypatch.chdir("/")
    assert install_command("hf") == f"pip install -e '{tmp_path}[hf]'"


def test_a_deleted_current_folder_does_not_replace_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Any
) -> None:
    """Otherwise an export would stop at the first HEIF image, instead of reporting one failure."""
    installed(None)
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert install_command("heif") == "pip install 'qwen-vit[heif]'"
    monkeypatch.setattr(installation, "CHECKOUT", ROOT)
    assert install_command("heif") == f"pip install -e '{ROOT}[heif]'"


def test_another_source_is_named_by_its_address(tmp_path: Path, installed: Any) -> None:
    wheel = tmp_path / "a b.whl"
    wheel.touch()
    installed({"url": wheel.as_uri(), "archive_info": {}})
    assert install_command("hf") == f"pip install 'qwen-vit[hf] @ {wheel.as_uri()}'"
    vcs = {"vcs": "git", "commit_id": "abc123"}
    installed({"url": "https://example.org/q.git", "vcs_info": vcs})
    assert install_command("hf") == (
        "pip install 'qwen-vit[hf] @ git+https://example.org/q.git@abc123'"
    )
    installed(None)  # installed from an index
    assert install_command("hf") == "pip install 'qwen-vit[hf]'"


def test_without_the_wheel_the_packages_of_the_extra_are_named(
    tmp_path: Path, installed: Any
) -> None:
    installed({"url": (tmp_path / "gone.whl").as_uri(), "archive_info": {}})
    assert install_command("show") == "pip install 'jinja2>=3.1' 'matplotlib>=3.9'"


def test_the_pip_of_another_python_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Any
) -> None:
    """tools/demo runs .venv/bin/qwen-vit, where the remedy's `pip` once was the system's pip."""
    installed(None)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/pip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert install_command("hf") == ".venv/bin/python -m pip install 'qwen-vit[hf]'"


def test_the_metadata_of_this_package_is_found() -> None:
    assert any(text.startswith("transformers>=") for text in installation._packages_of("hf"))


def test_no_remedy_names_the_index() -> None:
    """No index has the package."""
    for path in (ROOT / "qwen_vit").rglob("*.py"):
        assert "pip install 'qwen-vit" not in path.read_text("utf-8"), path
