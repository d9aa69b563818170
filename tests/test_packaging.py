"""Test that the built wheel is complete, works without a checkout, and that the pins fit."""

import ast
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from contextlib import suppress
from email.parser import Parser
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import qwen_vit
from tests.support import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PHOTOGRAPH = ROOT / "tests" / "photographs" / "chelsea.png"
IMPORT_NAMES = {"pillow": "PIL", "azure-core": "azure"}  # where the names differ


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Run the command in `folder` and return its output. If it fails, show its stderr."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    run([*build, str(ROOT)], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that contains only the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile"]
    run([*pip, "--target", str(folder), str(wheel)], folder)
    return folder


def test_the_wheel_contains_the_package_its_licence_and_its_weights(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        licence = archive.read(f"{info}/licenses/LICENSE")
        packed = archive.read("qwen_vit/weights/tiny/model.safetensors")
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert packed == (ROOT / "weights/tiny/model.safetensors").read_bytes()
    package = ROOT / "qwen_vit"
    sources = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    weights = {str(Path("qwen_vit") / path.relative_to(ROOT)) for path in weight_files()}
    packaged = {name for name in names if not name.startswith(info)}
    templates = {str(path.relative_to(ROOT)) for path in package.rglob("*.jinja")}
    assert {Path(name).stem for name in templates} == {"base.html", "page.html", "report.html"}
    assert packaged == sources | weights | templates | {"qwen_vit/py.typed"}


def weight_files() -> list[Path]:
    return [path for path in (ROOT / "weights").rglob("*") if path.is_file()]


def test_the_wheel_declares_its_requirements(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "qwen-vit"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    needed = {each.name: str(each.specifier) for each in requirements if each.marker is None}
    assert needed["torch"] == ">=2.11"
    assert needed["triton"] == ">=3.6"
    assert needed["pillow"] == ">=13.0"
    assert "transformers" not in needed


def test_everything_the_package_imports_is_declared() -> None:
    """An undeclared dependency works only if another package installs it."""
    imported = set()
    for path in (ROOT / "qwen_vit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).partition(".")[0])
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [
        line for name, lines in extras.items() if name != "dev" for line in lines
    ]
    names = [Requirement(line).name for line in lines]
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    engines = {"sglang", "vllm"}  # an engine itself imports these modules
    chosen = {"qwen_vl_utils"}  # `compare` uses it only if it is installed
    assert imported - set(sys.stdlib_module_names) - {"qwen_vit"} - engines - chosen <= declared


def names_for_type_checkers() -> dict[str, str]:
    """Return the public names that the package imports under TYPE_CHECKING, each with its
    module."""
    tree = ast.parse(Path(qwen_vit.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    for node in imports:  # type checkers treat X as public in `import X as X`
        assert all(alias.name == alias.asname for alias in node.names), ast.unparse(node)
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_type_checkers_and_python_see_the_same_public_names() -> None:
    listed = names_for_type_checkers()
    package: Any = qwen_vit
    assert sorted({"__version__", *listed}) == package.__all__
    for name, module in listed.items():
        assert getattr(qwen_vit, name) is getattr(import_module(module), name)
    assert set(package.__all__) <= set(dir(qwen_vit))
    with pytest.raises(AttributeError, match="module 'qwen_vit' has no attribute 'Encoder'"):
        package.Encoder  # noqa: B018


PUBLIC = {
    "qwen_vit": """ArgumentError CheckpointError ComparisonError ExportError ExportOptions
        FailedImage FeatureFile FeatureFolder HubError ImageError ImageFeatures ImageInput
        ImageLimits QwenVitError VisionEncoder __version__ as_hf_tower expand_placeholders
        export_features fused_rope_varlen_attention load_features write_features""",
    "qwen_vit.errors": """IMAGE_CODES ArgumentError CheckpointError ComparisonError ExportError
        HubError ImageError QwenVitError""",
    "qwen_vit.downstream": """as_hf_tower expand_placeholders to_hf to_sglang to_vllm
        to_vllm_chat_part""",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_exist_in_their_modules(module: str) -> None:
    found = import_module(module)
    names = PUBLIC[module].split()
    assert [name for name in names if not hasattr(found, name)] == []
    assert set(names) <= set(found.__all__)


def test_importing_the_package_imports_nothing_else() -> None:
    """A command that only prints its help must not wait for torch."""
    code = "import sys, qwen_vit; dir(qwen_vit); print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in run([sys.executable, "-c", code], ROOT).split()}
    bare = run([sys.executable, "-c", "import sys; print(*sys.modules)"], ROOT).split()
    third_party = loaded - {name.partition(".")[0] for name in bare} - set(sys.stdlib_module_names)
    assert third_party == {"qwen_vit"}


# `opened` shows that the process reads only the photograph from the checkout.
ENCODE = """
import json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from qwen_vit import VisionEncoder
import qwen_vit
features = VisionEncoder.from_pretrained("tiny", device="cpu").encode(sys.argv[1])
print(json.dumps({
    "file": qwen_vit.__file__, "opened": opened, "shape": list(features.embeds.shape),
    "grid": [int(n) for n in features.grid_thw], "finite": bool(features.embeds.isfinite().all()),
}))
"""


def test_the_installed_wheel_encodes_a_photograph_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", ENCODE, str(PHOTOGRAPH)]
    seen = json.loads(run(command, tmp_path, PYTHONPATH=str(installed)))
    assert Path(seen["file"]).is_relative_to(installed)
    # Sides are rounded to 28 px: 451x300 becomes 448x308, with one token per 28x28 px.
    assert seen["grid"] == [1, 22, 32]
    assert seen["shape"] == [11 * 16, 192]
    assert seen["finite"]
    ours = [path for path in map(Path, seen["opened"]) if path.is_relative_to(ROOT)]
    environment = Path(sys.prefix)
    assert {path for path in ours if not path.is_relative_to(environment)} == {PHOTOGRAPH}
    assert str(installed / "qwen_vit/weights/tiny/config.json") in seen["opened"]


@pytest.mark.parametrize("command", ["module", "script"])
def test_the_installed_command_finds_its_packaged_weights(
    installed: Path, tmp_path: Path, command: str
) -> None:
    start = {
        "module": [sys.executable, "-m", "qwen_vit"],
        "script": [sys.executable, str(installed / "bin" / "qwen-vit")],
    }[command]
    output = run([*start, "info", "tiny", "--json"], tmp_path, PYTHONPATH=str(installed))
    assert "192" in json.dumps(json.loads(output))  # 192 is out_hidden_size


def test_every_pin_satisfies_its_requirement() -> None:
    pins = constraints()
    extras = PROJECT["optional-dependencies"]
    for line in PROJECT["dependencies"] + [line for each in extras.values() for line in each]:
        requirement = Requirement(line)
        if requirement.name != PROJECT["name"]:
            (pin,) = pins[canonicalize_name(requirement.name)].specifier
            assert requirement.specifier.contains(pin.version), line


def test_every_pin_accepts_the_oldest_python() -> None:
    """A pin that required Python 3.11.5 once broke the installation on Debian 12, with 3.11.2."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    for name in constraints():
        with suppress(PackageNotFoundError):  # the pins of extras that this machine lacks
            accepted = metadata(name)["Requires-Python"] or ""
            assert SpecifierSet(accepted).contains(oldest), f"{name}: {accepted}"


def test_the_pins_fit_a_machine_with_a_gpu_and_one_without() -> None:
    """A local version such as 2.13.0+cpu, or a CUDA package, would fit only one kind of machine."""
    for name, requirement in constraints().items():
        (pin,) = requirement.specifier
        assert (pin.operator, "+" in pin.version) == ("==", False), name
        assert not name.startswith(("nvidia-", "cuda-")), name


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "tools" / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def test_the_page_of_the_installation_names_every_extra() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    rows = "".join(line for line in page.splitlines() if line.startswith("| `"))
    assert [name for name in PROJECT["optional-dependencies"] if f"`{name}`" not in rows] == []
