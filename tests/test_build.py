"""What setup.py decides about the CUDA kernels."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

for needed in ("setuptools", "pybind11"):
    pytest.importorskip(needed)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, where the environment says nothing and there is an nvcc."""
    spec = importlib.util.spec_from_file_location("fastrnn_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    nvcc = tmp_path / "nvcc"
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.delenv("FASTRNN_CUDA", raising=False)
    return module


def with_torch(folder: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    """Let a torch that cannot be imported, as it need not be, be the one that is installed."""
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError")
    (package / "version.py").write_text(f"__version__ = '2.99.0'\ncuda = {cuda!r}\n")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    importlib.invalidate_caches()


def decided(build: ModuleType, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """The extensions to build, and what the build says about CUDA."""
    names = [extension.name for extension in build.extensions()]
    return names, capsys.readouterr().out.strip()


def test_no_cuda_unless_torch_has_it(
    build: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_torch(tmp_path, monkeypatch, None)
    names, said = decided(build, capsys)
    assert names == ["fastrnn._C"]
    assert said == (
        "fastrnn: CUDA left out: no torch with CUDA is here; FASTRNN_CUDA=1 builds it all the same"
    )


def test_cuda_for_a_torch_that_has_it(
    build: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_torch(tmp_path, monkeypatch, "13.9")
    names, said = decided(build, capsys)
    assert names == ["fastrnn._C", "fastrnn._cuda"]
    assert said == "fastrnn: CUDA built: torch has CUDA 13.9"
    monkeypatch.setenv("NVCC", "no-such-compiler")
    names, said = decided(build, capsys)
    assert names == ["fastrnn._C"]
    assert said == "fastrnn: CUDA left out: torch has CUDA 13.9, but there is no nvcc"


def test_the_environment_decides(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTRNN_CUDA", "1")
    names, said = decided(build, capsys)
    assert names == ["fastrnn._C", "fastrnn._cuda"]
    assert said == "fastrnn: CUDA built: FASTRNN_CUDA=1"
    monkeypatch.setenv("FASTRNN_CUDA", "0")
    names, said = decided(build, capsys)
    assert names == ["fastrnn._C"]
    assert said == "fastrnn: CUDA left out: FASTRNN_CUDA=0"
    monkeypatch.setenv("FASTRNN_CUDA", "1")
    monkeypatch.setenv("NVCC", "no-such-compiler")
    with pytest.raises(SystemExit, match="FASTRNN_CUDA=1 needs nvcc"):
        build.extensions()
    monkeypatch.setenv("FASTRNN_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTRNN_CUDA must be 0 or 1"):
        build.extensions()
