"""How many cores the process may use, and that the kernels have no more threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers import run_python

from fastrnn import cores
from fastrnn.backends import cpu

_C = pytest.importorskip("fastrnn._C")

Files = dict[str, str]


def check(code: str, **environment: str) -> str:
    """Its output, where it does not fail."""
    result = run_python(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


CGROUP2 = "31 23 0:28 {root} {mount} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
CGROUP1 = "33 32 0:30 {root} {mount} rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
OTHERS = (
    "23 1 254:1 / / rw,relatime - ext4 /dev/vda rw\n"
    "34 32 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)
V1, V2 = "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup"


def mounts(line: str, mount: str, root: str = "/") -> str:
    return OTHERS + line.format(mount=mount, root=root)


def v2(own: str, limits: Files, root: str = "/") -> Files:
    """A process in the group `own`; `limits` has a cpu.max by group."""
    return {
        "proc/self/cgroup": f"0::{own}\n",
        "proc/self/mountinfo": mounts(CGROUP2, V2, root),
        **{f"sys/fs/cgroup/{group}/cpu.max": limit for group, limit in limits.items()},
    }


def v1(own: str, limits: dict[str, tuple[str, str]], root: str = "/") -> Files:
    """The same of version 1, where quota and period have a file each."""
    files = {
        "proc/self/cgroup": f"5:cpuset:/elsewhere\n4:cpu,cpuacct:{own}\n1:name=systemd:/\n0::/\n",
        "proc/self/mountinfo": mounts(CGROUP1, V1, root),
    }
    for group, (quota, period) in limits.items():
        files[f"{V1[1:]}/{group}/cpu.cfs_quota_us"] = quota
        files[f"{V1[1:]}/{group}/cpu.cfs_period_us"] = period
    return files


HYBRID = {
    **v1("/job", {"job": ("300000\n", "100000\n")}),
    "proc/self/mountinfo": CGROUP2.format(mount="/sys/fs/cgroup/unified", root="/")
    + mounts(CGROUP1, V1),
}
QUOTAS = {
    "no /proc": ({}, None),
    "v2, root group": (v2("/", {}), None),
    "v2": (v2("/", {".": "400000 100000\n"}), 4),
    "v2, max": (v2("/job", {"job": "max 100000\n"}), None),
    "v2, a fraction and a half": (v2("/job", {"job": "150000 100000\n"}), 2),
    "v2, a twentieth": (v2("/job", {"job": "5000 100000\n"}), 1),
    "v2, another period": (v2("/job", {"job": "60000 20000\n"}), 3),
    "v2, an outer group has less": (
        v2(
            "/pod/box/job",
            {"pod": "200000 100000\n", "pod/box": "max 100000\n", "pod/box/job": "800000 100000\n"},
        ),
        2,
    ),
    "v2, an inner group has less": (
        v2("/pod/job", {"pod": "800000 100000\n", "pod/job": "300000 100000\n"}),
        3,
    ),
    "v2, not a group beside": (v2("/pod/a", {"pod/b": "100000 100000\n"}), None),
    "v2, mounted from the container's group on": (
        v2("/docker/1/job", {".": "500000 100000\n", "job": "300000 100000\n"}, root="/docker/1"),
        3,
    ),
    "v2, the path of another namespace": (v2("/../other", {".": "500000 100000\n"}, root="/a"), 5),
    "v2, garbage": (v2("/job", {"job": "much of it\n", ".": "600000 100000\n"}), 6),
    "v2, empty": (v2("/job", {"job": ""}), None),
    "v2, one number": (v2("/job", {"job": "200000\n"}), None),
    "v2, no period": (v2("/job", {"job": "200000 0\n"}), None),
    "v1": (v1("/job", {"job": ("200000\n", "100000\n")}), 2),
    "v1, none": (v1("/job", {"job": ("-1\n", "100000\n")}), None),
    "v1, a fraction": (v1("/job", {"job": ("250000\n", "100000\n")}), 3),
    "v1, an outer group has less": (
        v1("/pod/job", {"pod": ("100000\n", "50000\n"), "pod/job": ("-1\n", "100000\n")}),
        2,
    ),
    "v1, mounted from the container's group on": (
        v1("/docker/1", {".": ("700000\n", "100000\n")}, root="/docker/1"),
        7,
    ),
    "v1, a file is missing": (
        {k: v for k, v in v1("/", {".": ("200000\n", "100000\n")}).items() if "period" not in k},
        None,
    ),
    "v1 beside v2": (HYBRID, 3),
    "garbage in /proc": (
        {"proc/self/cgroup": "\0:\nno colons\n", "proc/self/mountinfo": "short - line\n - \n\n"},
        None,
    ),
}


@pytest.mark.parametrize(("files", "expected"), QUOTAS.values(), ids=QUOTAS.keys())
def test_quota(tmp_path: Path, files: Files, expected: int | None) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cores.quota(tmp_path) == expected


def test_usable_cores_are_the_least_of_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, quota, usable in ((8, None, 8), (8, 2, 2), (1, 2, 1)):
        monkeypatch.setattr(cores, "available_cores", lambda n=available: n)
        monkeypatch.setattr(cores, "quota", lambda n=quota: n)
        assert cores.usable_cores() == usable


needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the system has no affinity"
)


@needs_affinity
def test_affinity_is_that_of_the_moment() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores.available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cores.available_cores() == len(before)


def test_bound_threads_do_not_hide_the_other_cores() -> None:
    """OpenMP binds the main thread to one core, which is its affinity then."""
    code = "from fastrnn.cores import available_cores; print(available_cores())"
    counted = {check(code, OMP_PROC_BIND=bind) for bind in ("true", "false")}
    assert len(counted) == 1


_LAYERS = """
import os, sys, torch, fastrnn
from fastrnn import _C

def gradients(layer, x):
    layer.zero_grad()
    y, _ = layer(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in layer.parameters())]

torch.manual_seed(0)
x = torch.randn(30, 2, 64)
layers = [kind(64, 160) for kind in (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN)]
"""
_TASKS = """
def tasks():
    return len(os.listdir("/proc/self/task"))
"""


@needs_affinity
@pytest.mark.parametrize(
    "limit", ["os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", "_C.limit_cores(1)"]
)
def test_one_core_has_one_thread(limit: str) -> None:
    code = f"""
{_LAYERS}{_TASKS}
torch.set_num_threads(4)
{limit}
before = tasks()
for layer in layers:
    layer(torch.randn(50, 32, 64))
print(tasks() - before)
"""
    assert check(code).split() == ["0"]


def test_fewer_cores_than_threads_give_the_bits_of_as_many_threads() -> None:
    """On threads that are gone afterwards: torch's own are as many as before."""
    code = f"""
{_LAYERS}{_TASKS}
_C.limit_cores(2)
torch.set_num_threads(2)
expected = [gradients(layer, x) for layer in layers]
torch.set_num_threads(6)
torch.randn(1 << 20).tanh()
before = tasks()
for layer, truth in zip(layers, expected):
    assert all(map(torch.equal, gradients(layer, x), truth))
assert tasks() == before, (tasks(), before)
"""
    check(code)


@needs_affinity
def test_threads_that_share_a_core_give_the_bits_of_those_that_do_not() -> None:
    """They wait until the core has come to the others."""
    code = f"""
{_LAYERS}
_C.use_all_threads(True)
torch.set_num_threads(5)
expected = [gradients(layer, x) for layer in layers]
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
for layer, truth in zip(layers, expected):
    assert all(map(torch.equal, gradients(layer, x), truth))
"""
    check(code)


def test_more_cores_between_a_kernels_answer_and_its_next_call() -> None:
    """More threads take more scratch memory than the kernel said: it is asked again, rather than
    left without having computed anything."""
    takes, given = iter([100, 200, 200]), []

    def kernel(memory: torch.Tensor) -> int:
        given.append(memory.numel())
        needed = next(takes)
        return needed if memory.numel() < needed else 0

    cpu._Workspace().run(kernel)
    assert given == [0, 100, 200]
