"""Compiles the Triton kernels ahead of time, without a device, and tells what each one takes.

``python triton_aot.py TARGET`` prints one JSON line a kernel; TARGET "launch" prints instead how
often launches of changing sizes compile. It wants a process without TRITON_INTERPRET."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from fastrnn.backends.triton import kernels, plan
from fastrnn.backends.triton.cells import TWINS
from fastrnn.cells import CELLS

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Target(NamedTuple):
    gpu: GPUTarget
    limits: plan.Limits
    registers: int  # that a thread may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), plan.Limits("cuda", 163 << 10, 108), 255),
    "sm_90": Target(GPUTarget("cuda", 90, 32), plan.Limits("cuda", 227 << 10, 132), 255),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), plan.Limits("hip", 64 << 10, 304), 512),
}


class Call(NamedTuple):
    """One launch: `full` has two groups, lengths, resets to given states and all states."""

    kernel: str
    scan: plan.Scan
    plan: plan.Plan
    full: bool

    def tensors(self) -> dict[str, torch.dtype | None]:
        """The dtype of every tensor that the kernel takes, None for those it does without."""
        cell, p, own, wide = self.scan.cell, self.plan, self.scan.dtype, torch.float32
        has_c = cell.states > 1
        full, full_c = self.full, self.full and has_c
        common = {
            "w_hh": own, "h": wide, "c": wide if has_c else None,
            "lengths": torch.int64 if full else None, "offsets": None,
            "reset": torch.uint8 if full else None,
            "arrived": torch.int32 if p.resident and not p.whole else None,
            "saved": own, "c_before": wide if has_c else None,
        }  # fmt: skip
        if self.kernel == "forward_scan":
            return common | {
                "gates_x": own, "bias": own, "h_reset": own if full else None,
                "c_reset": own if full_c else None, "exchange": None if p.whole else own,
                "y": own, "c_all": own if full_c else None,
            }  # fmt: skip
        return common | {
            "dy": own, "dc_all": own if full_c else None, "h_before": own,
            "dh_reset": wide if full else None, "dc_reset": wide if full_c else None,
            "dgates_h": own, "dgates_x": None if cell.shared_dgates else own,
        }  # fmt: skip

    def constants(self) -> dict[str, Any]:
        cell, p, twin = self.scan.cell, self.plan, TWINS[self.scan.cell.name]
        which = (
            {"FORWARD": twin.forward}
            if self.kernel == "forward_scan"
            else {"BACKWARD": twin.backward}
        )
        return which | {
            "GATES": cell.gates, "STATES": cell.states, "SAVED": cell.saved,
            "G": self.scan.G, "H": self.scan.H, "BU": p.BU, "BB": p.BB, "BK": p.BK,
            "CHUNKS": p.chunks, "HELD": p.held, "WHOLE": p.whole, "JOINED": p.joined,
            "PRECISION": "ieee" if self.scan.exact else "tf32",
        }  # fmt: skip

    def options(self) -> dict[str, Any]:
        waits = self.plan.resident and not self.plan.whole
        return {"num_warps": self.plan.warps, "num_stages": 1, "launch_cooperative_grid": waits}

    def compiled(self, target: Target) -> Any:
        kernel = getattr(kernels, self.kernel)
        constants = self.constants()
        signature, aligned = {}, {}
        tensors = self.tensors()
        for k, name in enumerate(kernel.arg_names):
            if name not in tensors:
                signature[name] = "constexpr" if name in constants else "i32"
                continue
            dtype = tensors[name]
            if dtype is None:
                signature[name], constants[name] = "constexpr", None
                continue
            kinds = NAMES | {torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}
            signature[name], aligned[(k,)] = f"*{kinds[dtype]}", [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
        return triton.compile(source, target=target.gpu, options=self.options())


def calls(limits: plan.Limits) -> Iterator[Call]:
    """Every kernel, in every regime and in every kind of product, of every cell but for the RNN's
    second one: what is done with its one gate takes no more."""
    sizes = {
        (torch.bfloat16, False): ((64, 128), (64, 256), (2048, 1500)),
        (torch.float32, False): ((64, 128),),
        (torch.float32, True): ((64, 32), (64, 256)),
    }
    cells = [cell for name, cell in CELLS.items() if name != "rnn_relu"]
    for cell, ((dtype, exact), shapes) in product(cells, sizes.items()):
        for k, (B, H) in enumerate(shapes):
            full = k == 1
            scan = plan.Scan(cell, dtype, exact, 2 if full else 1, B, H)
            for kernel in ("forward_scan", "backward_scan"):
                yield Call(kernel, scan, plan.plan(scan, limits), full)


def resources(binary: Any, target: Target) -> dict[str, int]:
    """Registers of a thread, bytes of shared memory, and bytes that a thread has spilled."""
    shared = int(binary.metadata.shared)
    if target.gpu.backend == "hip":
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", binary.asm["amdgcn"]))
        registers, spilled = int(found["vgpr_count"]), int(found["private_segment_fixed_size"])
        return {"registers": registers, "shared": shared, "spilled": spilled}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    return {"registers": int(found["REG"]), "shared": shared, "spilled": spilled}


def report(name: str) -> Iterator[dict[str, Any]]:
    target = TARGETS[name]
    for call in calls(target.limits):
        scan, p = call.scan, call.plan
        regime = "whole" if p.whole else "grid" if p.resident else "steps"
        what = f"{scan.cell.name} {call.kernel} {scan.dtype} exact={scan.exact} H={scan.H} {regime}"
        used = resources(call.compiled(target), target)
        yield {"what": what, **used, "limits": [target.registers, target.limits.shared]}


class NoDevice:
    """As much of a driver as the launcher asks for before it needs a device."""

    def get_current_target(self) -> GPUTarget:
        return TARGETS["sm_90"].gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launches() -> Iterator[dict[str, Any]]:
    """How many kernels there are after launches of one layer with other lengths and batches."""
    driver.set_active(NoDevice())
    limits = TARGETS["sm_90"].limits
    for kernel, H in product(("forward_scan", "backward_scan"), (64, 512)):
        before = _kernels(kernel)
        for T, B in ((512, 64), (1, 1), (16, 33), (70_000, 17), (3, 16)):
            scan = plan.Scan(CELLS["gru"], torch.float16, False, 1, B, H)
            call = Call(kernel, scan, plan.plan(scan, limits), False)
            tensors = {n: d if d is None else MockTensor(d) for n, d in call.tensors().items()}
            getattr(kernels, kernel).warmup(
                grid=(call.plan.tiles, call.plan.slices, 1), **tensors, **call.constants(),
                T=T, B=B, backwards=0, begin=0, end=T, **call.options(),
            )  # fmt: skip
        yield {"what": f"{kernel} H={H}", "compiled": _kernels(kernel) - before}


def _kernels(name: str) -> int:
    caches = getattr(kernels, name).device_caches
    return len(caches[0][0]) if 0 in caches else 0


if __name__ == "__main__":
    for line in launches() if sys.argv[1] == "launch" else report(sys.argv[1]):
        print(json.dumps(line), flush=True)
