"""Builds fastrnn._C: the CPU kernels once per instruction set, all else once, in one library; and,
where it is wanted, fastrnn._cuda: the CUDA kernels once per precision, for all architectures.

Ninja does the work, so that a second build compiles only what changed. CXX, CXXFLAGS, LDFLAGS and
MAX_JOBS are honoured. FASTRNN_ISAS names the instruction sets to build besides the portable one, as
"avx2 avx512", all by default. FASTRNN_CUDA=1 asks for fastrnn._cuda and FASTRNN_CUDA=0 for none;
without either it is built where there are nvcc and a torch that is built for CUDA. NVCC names the
compiler, FASTRNN_CUDA_ARCHS the architectures.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS = "csrc/cpu/kernels.cpp"
PYTHON_SOURCES = {"bindings", "tensor"}  # which know pybind11
CUDA_KERNELS = "csrc/cuda/kernels.cu"
CUDA_PRECISIONS = ["F32", "Tf32", "Bf16", "F16"]
# Code for 8.0 also runs on 8.6 and 8.9, for 10.0 on 10.3, for 12.0 on 12.1.
CUDA_ARCHS = "80 90 100 120"
X86 = platform.machine().lower() in {"x86_64", "amd64"}

LANGUAGE = shlex.split("-std=c++17 -O3 -fopenmp -fPIC -fvisibility=hidden")
COMMON = [*LANGUAGE, *shlex.split("-ffp-contract=fast -fno-math-errno -Icsrc")]
AVX2 = shlex.split("-mavx2 -mfma -mf16c")
AVX512 = shlex.split("-mavx512f -mavx512vl -mavx512dq -mavx512bw -mavx2 -mfma")
AVX512.append("-mprefer-vector-width=512")
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
X86_SETS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}


class Unit(NamedTuple):
    source: str
    target: str  # the object file's name inside the build folder
    flags: list[str]


def find_compiler() -> list[str]:
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX={asked[0]} is not there" if asked else "install g++ or clang++, or set CXX"
    raise SystemExit(f"fastrnn needs a C++17 compiler: {missing}")


def refusal(compiler: list[str], flags: list[str]) -> str | None:
    """What the compiler says against `flags`, or None where it accepts them."""
    headers = ["omp.h", "immintrin.h"] if flags else ["omp.h"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("".join(f"#include <{name}>\n" for name in headers))
        command = [*compiler, *COMMON, *flags, "-c", str(source), "-o", f"{folder}/probe.o"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.stderr if result.returncode else None


def instruction_sets(compiler: list[str]) -> dict[str, list[str]]:
    """The sets to build: portable always, the others where machine kind and compiler have them."""
    name = shlex.join(compiler)
    complaint = refusal(compiler, [])
    if complaint is not None:
        raise SystemExit(f"{name} cannot compile C++17 with OpenMP:\n{complaint}")
    asked = os.environ.get("FASTRNN_ISAS", "").split() or [*X86_SETS]
    unknown = set(asked) - {"portable", *X86_SETS}
    if unknown:
        raise SystemExit(f"FASTRNN_ISAS: choose from portable, {', '.join(X86_SETS)}")
    wanted = {isa: flags for isa, flags in X86_SETS.items() if X86 and isa in asked}
    known = {isa: flags for isa, flags in wanted.items() if refusal(compiler, flags) is None}
    for isa in wanted.keys() - known.keys():
        print(f"fastrnn: left out {isa}: {name} does not accept {shlex.join(wanted[isa])}")
    print(f"fastrnn: instruction sets built: {', '.join(['portable', *known])}", flush=True)
    return {"portable": [], **known}


def compile_units(sets: dict[str, list[str]], sources: list[str]) -> list[Unit]:
    defines = ["-DFASTRNN_X86=1"] if X86 else []
    defines += [f"-DFASTRNN_HAVE_{isa.upper()}=1" for isa in sets]
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    units = []
    for source in sources:
        stem = source.removeprefix("csrc/").removesuffix(".cpp")
        if source != KERNELS:
            extra = python if stem in PYTHON_SOURCES else []
            units.append(Unit(source, f"{stem}.o", defines + extra))
    # The linker keeps the first copy of an inline function: the most portable object goes first.
    for isa, flags in sets.items():
        units.append(
            Unit(KERNELS, f"cpu/kernels.{isa}.o", [*defines, f"-DFASTRNN_ISA={isa}", *flags])
        )
    return units


def find_nvcc() -> tuple[str | None, str]:
    """The CUDA compiler, or None if this build goes without it; and the reason."""
    asked = os.environ.get("FASTRNN_CUDA", "")
    if asked not in {"", "0", "1"}:
        raise SystemExit(f"FASTRNN_CUDA must be 0 or 1, not {asked!r}")
    if asked == "0":
        return None, "FASTRNN_CUDA=0"
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if asked == "1":
        if nvcc is None:
            raise SystemExit("FASTRNN_CUDA=1 needs nvcc: install the CUDA toolkit, or set NVCC")
        return nvcc, "FASTRNN_CUDA=1"
    version = torch_cuda_version()
    if version is None:
        return None, "no torch with CUDA is here; FASTRNN_CUDA=1 builds it all the same"
    return nvcc, f"torch has CUDA {version}" + ("" if nvcc else ", but there is no nvcc")


def torch_cuda_version() -> str | None:
    """Of the torch that is installed, or None. It is read and not imported, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = Path(spec.origin).with_name("version.py")
    cuda: str | None = runpy.run_path(str(version)).get("cuda") if version.exists() else None
    return cuda


def virtual_arch(arch: str) -> str:
    """What its code is compiled to first: for all with clusters once, and not for each anew."""
    if not arch.isdigit():
        return f"compute_{arch}"
    return "compute_90" if int(arch) >= 90 else f"compute_{arch}"


def cuda_ninja_text(compiler: list[str], nvcc: str, sources: list[str], target: str) -> str:
    """Plain C++ by the host's compiler, *.cu and the link, which brings cudart, by nvcc."""
    archs = os.environ.get("FASTRNN_CUDA_ARCHS", CUDA_ARCHS).split()
    code = [f"-gencode=arch={virtual_arch(arch)},code=sm_{arch}" for arch in archs]
    host = [compiler[0], "-Xcompiler=-fPIC,-fvisibility=hidden"]
    cuda = [nvcc, "-ccbin", *host, *shlex.split("-std=c++17 -O3 -Icsrc -Xptxas=-v"), *code]
    plain = [*compiler, *shlex.split("-std=c++17 -O2 -fPIC -fvisibility=hidden -Icsrc -MMD")]
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    folder = Path(target).parent.as_posix()
    lines = [
        f"builddir = {folder}/cuda",
        "rule cpp",
        f"  command = {shlex.join([*plain, *python])} -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule cu",  # the log keeps ptxas' report of registers and spills for the tests
        f"  command = {shlex.join(cuda)} -MD -MF $out.d $flags -c $in -o $out 2> $out.log"
        " || { cat $out.log; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {shlex.join([nvcc, '-ccbin', compiler[0], *code])} -shared -cudart static"
        " $in -o $out",
        "  description = link $out",
    ]
    objects = []
    for source in sources:
        variants = CUDA_PRECISIONS if source == CUDA_KERNELS else [""]
        for variant in variants:
            name = f"{folder}/cuda/{Path(source).stem}{variant and '.' + variant}.o"
            objects.append(name)
            lines.append(f"build {name}: {Path(source).suffix[1:]} {source}")
            lines += [f"  flags = -DFASTRNN_PRECISION={variant}"] * bool(variant)
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def ninja_text(compiler: list[str], units: list[Unit], target: str, kind: list[str]) -> str:
    def words(*lists: list[str]) -> str:
        return shlex.join([word for words in lists for word in words]).replace("$", "$$")

    own = shlex.split(os.environ.get("CXXFLAGS", ""))
    libraries = shlex.split(os.environ.get("LDFLAGS", ""))
    folder = Path(target).parent.as_posix()
    lines = [
        f"builddir = {folder}",  # where ninja keeps its log
        "rule compile",
        f"  command = {words(compiler, ['-MMD'], COMMON)} -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {words(compiler, kind, LANGUAGE, own)} $in -o $out {words(libraries)}",
        "  description = link $out",
    ]
    for unit in units:
        lines.append(f"build {folder}/{unit.target}: compile {unit.source}")
        lines.append(f"  flags = {words(unit.flags, own)}")
    lines.append(f"build {target}: link {' '.join(f'{folder}/{unit.target}' for unit in units)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):  # type: ignore[misc]  # setuptools is untyped
    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
        # Not under self.build_temp: an editable install throws that away, and every object in it.
        stem = ext.name.rpartition(".")[2]
        library = Path("build", f"ninja{suffix.removesuffix('.so')}", f"{stem}{suffix}")
        (ROOT / library).parent.mkdir(parents=True, exist_ok=True)
        script = library.with_name(f"{stem}.ninja")
        (ROOT / script).write_text(self.ninja_text(ext, compiler, library.as_posix()))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        ninja = [sys.executable, "-m", "ninja", "-f", str(script), *jobs]
        subprocess.run(ninja, cwd=ROOT, check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / library, target)

    def ninja_text(self, ext: Extension, compiler: list[str], target: str) -> str:
        sources = sorted(ext.sources)
        if ext.name != "fastrnn._cuda":
            units = compile_units(instruction_sets(compiler), sources)
            return ninja_text(compiler, units, target, ["-shared"])
        nvcc, _ = find_nvcc()
        assert nvcc is not None
        return cuda_ninja_text(compiler, nvcc, sources, target)


def files(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def extensions() -> list[Extension]:
    headers = files("csrc/**/*.h")
    cpu = [*files("csrc/*.cpp"), *files("csrc/cpu/*.cpp")]
    found = [Extension("fastrnn._C", sources=cpu, depends=headers)]
    nvcc, why = find_nvcc()
    print(f"fastrnn: CUDA {'left out' if nvcc is None else 'built'}: {why}", flush=True)
    if nvcc is None:
        return found
    cuda = [*files("csrc/cuda/*.cpp"), *files("csrc/cuda/*.cu")]
    return [*found, Extension("fastrnn._cuda", sources=cuda, depends=headers)]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": NinjaBuild},
    )
