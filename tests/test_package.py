"""The package: a wheel of the layers alone, imported from elsewhere with torch alone."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
# Imports the wheel's loralib in a process that refuses what is neither torch nor of Python's own.
USE = """
import sys, importlib.abc
wheel, packages = sys.argv[1:]
sys.path[:0] = [wheel]
sys.path.append(packages)
import torch
known = set(sys.modules) | set(sys.stdlib_module_names)

class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*known, "torch", "loralib"}:
            raise ImportError(f"loralib imports {name}")

sys.meta_path.insert(0, Refusing())
import loralib
assert loralib.__file__.startswith(wheel), loralib.__file__
layer = loralib.Linear(8, 4, r=2, lora_alpha=4)
loralib.mark_only_lora_as_trainable(layer)
layer(torch.ones(1, 8)).sum().backward()
print(sorted(loralib.lora_state_dict(layer)))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy without a network; the environment stays as it is."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("THE PACKAGE IS NOT TESTED: setuptools is not installed")
    folder = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "loralib", folder / "loralib")
    command = [sys.executable, "-c", BUILD, str(folder / "dist")]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.split()[-1]


def test_the_wheel_holds_the_layers_and_the_licence_and_depends_on_torch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        metadata = message_from_bytes(packed.read(next(n for n in names if "METADATA" in n)))
    about = f"gpt2_lora-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"loralib", about}
    modules = {f"loralib/{path.name}" for path in (ROOT / "loralib").glob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert any(name.endswith("LICENSE") for name in names)
    assert metadata.get_all("Requires-Dist") == ["torch"]
    assert metadata["License-Expression"] == "MIT"


def test_the_wheel_imports_from_another_folder_with_torch_alone(
    wheel: Path, tmp_path: Path
) -> None:
    packages = str(Path(torch.__file__).parents[1])
    command = [sys.executable, "-I", "-S", "-c", USE, str(wheel), packages]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, "['lora_A', 'lora_B']\n"), done.stderr


def test_the_version_is_the_same_wherever_it_is_named() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == PROJECT["version"]
    assert re.search(r"^version: (\S+)", citation, re.MULTILINE)[1] == PROJECT["version"]
