"""What the import says where a compiled extension is not there, or not for this Python."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import fastrnn.missing

ERROR = ImportError("cannot import name '_C' from partially initialized module")
ROOT = Path(fastrnn.missing.__file__).parents[1]


def reason_in(root: Path, *files: str, name: str = "_C") -> str:
    """What the package in `root` tells, with these files in it."""
    package = root / "fastrnn"
    package.mkdir()
    module = package / "missing.py"
    shutil.copy(fastrnn.missing.__file__, module)
    for file in files:
        (package / file).touch()
    spec = importlib.util.spec_from_file_location("missing_elsewhere", module)
    assert spec is not None
    assert spec.loader is not None
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    text: str = elsewhere.reason(name, ERROR)
    return text


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree, and no fastrnn elsewhere on the path."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "tree")])
    (tmp_path / "tree" / "csrc").mkdir(parents=True)
    return tmp_path / "tree"


def test_a_source_tree_is_to_be_built(tree: Path) -> None:
    text = reason_in(tree)
    command = "run python setup.py build_ext --inplace in"
    assert text == f"the extension fastrnn._C is not built in this source tree: {command} {tree}"


def test_the_cuda_extension_has_a_command_of_its_own(tree: Path) -> None:
    assert "run FASTRNN_CUDA=1 python setup.py build_ext" in reason_in(tree, name="_cuda")


def test_an_installed_package_is_to_be_installed_again(tmp_path: Path) -> None:
    assert reason_in(tmp_path).endswith("by pip install --force-reinstall --no-deps FOLDER")


def test_a_build_for_another_python_is_named(tree: Path) -> None:
    text = reason_in(tree, "_C.cpython-39-other.so")
    assert f"which wants _C{EXTENSION_SUFFIXES[0]} and not _C.cpython-39-other.so" in text
    assert "build_ext" in text


def test_one_that_does_not_load_keeps_the_loader_s_words(tree: Path) -> None:
    text = reason_in(tree, f"_C{EXTENSION_SUFFIXES[0]}")
    assert text == f"the extension fastrnn._C does not load: {ERROR}"


def test_a_source_tree_hides_an_installed_package(tmp_path: Path) -> None:
    """The import in a fresh process, in the folder of the tree."""
    tree, site = tmp_path / "tree", tmp_path / "site"
    shutil.copytree(
        ROOT / "fastrnn", tree / "fastrnn", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (tree / "csrc").mkdir()  # as a tree of sources has it
    (site / "fastrnn").mkdir(parents=True)
    (site / "fastrnn" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    code = (
        f"import sys; sys.path.append({str(site)!r})\n"
        # An editable installation's finder would lend the tree the extension of its own.
        "sys.meta_path = [f for f in sys.meta_path if '_Editable' not in repr(f)]\n"
        "import fastrnn\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr
    assert f"run python setup.py build_ext --inplace in {tree}, or start Python" in found.stderr
    assert f"the tree hides the fastrnn installed in {site / 'fastrnn'}" in found.stderr
    assert "circular import" not in found.stderr
