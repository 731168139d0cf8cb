"""What to do where a compiled part of fastrnn cannot be imported."""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_BUILD = {
    "_C": "python setup.py build_ext --inplace",
    "_cuda": "FASTRNN_CUDA=1 python setup.py build_ext --inplace",
}
_INSTALL = {
    "_C": "pip install --force-reinstall --no-deps",
    "_cuda": "FASTRNN_CUDA=1 pip install --force-reinstall --no-deps",
}


def reason(name: str, error: ImportError) -> str:
    """Why fastrnn.`name` raised `error` when it was imported, and which command mends that."""
    if _has_extension(_PACKAGE, name):
        return f"the extension fastrnn.{name} does not load: {error}"
    others = sorted(path.name for path in _PACKAGE.glob(f"{name}.*.so"))
    text = f"the extension fastrnn.{name} is not built"
    if others:
        wanted = f"{name}{EXTENSION_SUFFIXES[0]}"
        text = f"{text} for this Python, which wants {wanted} and not {', '.join(others)}"
    root = _PACKAGE.parent
    if not (root / "csrc").is_dir():
        return f"{text}: install fastrnn again from its sources, by {_INSTALL[name]} FOLDER"
    text = f"{text} in this source tree: run {_BUILD[name]} in {root}"
    hidden = _hidden_package(name)
    if hidden is not None:
        text += f", or start Python elsewhere: the tree hides the fastrnn installed in {hidden}"
    return text


def _has_extension(package: Path, name: str) -> bool:
    return any((package / f"{name}{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


def _hidden_package(name: str) -> Path | None:
    """Another fastrnn on the path of imports, which has the extension."""
    for entry in sys.path:
        package = Path(entry, "fastrnn").resolve()
        if package != _PACKAGE and _has_extension(package, name):
            return package
    return None
