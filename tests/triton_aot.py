"""Compiles the Triton kernels ahead of time, without a device, and tells what each one takes.

Run as a script, in a process that has not asked for the interpreter: `python triton_aot.py SPEC`
with SPEC a JSON list of [target, cell, dtype, tf32, T, B, H, feature], prints a JSON list of dicts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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


def pointers(kernel: str, dtype: str, states: int, shared: bool, whole: bool, waits: bool, full: bool) -> dict[str, str | None]:
    """The type of every pointer that `kernel` takes, None for those that a call does without."""
    c = states > 1

    def some(kind: str, given: bool = True) -> str | None:
        return kind if given else None

    own, wide = f"*{dtype}", "*fp32"
    both = {
        "w_hh": own, "h": wide, "c": some(wide, c), "lengths": some("*i64", full),
        "offsets": None, "reset": some("*u8", full), "arrived": some("*i32", waits),
    }  # fmt: skip
    if kernel == "forward_scan":
        return both | {
            "gates_x": own, "bias": own, "h_reset": some(own, full), "c_reset": some(own, full and c),
            "exchange": some(own, not whole), "y": own, "c_all": some(own, full and c),
            "saved": own, "c_before": some(wide, c),
        }  # fmt: skip
    return both | {
        "dy": own, "dc_all": some(own, full and c), "saved": own, "c_before": some(wide, c),
        "h_before": own, "dh_reset": some(wide, full), "dc_reset": some(wide, full and c),
        "dgates_h": own, "dgates_x": some(own, not shared),
    }  # fmt: skip


def compiled(kernel_name: str, target: Target, scan: plan.Scan, p: plan.Plan, full: bool) -> Any:
    kernel, cell = getattr(kernels, kernel_name), scan.cell
    waits = p.resident and not p.whole
    types = pointers(
        kernel_name, NAMES[scan.dtype], cell.states, cell.shared_dgates, p.whole, waits, full
    )
    constants: dict[str, Any] = {
        "GATES": cell.gates, "STATES": cell.states, "SAVED": cell.saved,
        "G": scan.G, "H": scan.H, "BU": p.BU, "BB": p.BB, "BK": p.BK, "CHUNKS": p.chunks,
        "HELD": p.held, "WHOLE": p.whole, "PRECISION": "ieee" if scan.exact else "tf32",
        "FORWARD": TWINS[cell.name].forward, "BACKWARD": TWINS[cell.name].backward,
    }  # fmt: skip
    constants |= {name: None for name, kind in types.items() if kind is None}
    signature, aligned = {}, {}
    for k, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*"):
            aligned[(k,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": p.warps, "num_stages": 1, "launch_cooperative_grid": waits}
    return triton.compile(source, target=target.gpu, options=options)


def resources(binary: Any, target: Target) -> dict[str, int]:
    """Registers of a thread, bytes of shared memory, and bytes or registers spilled."""
    shared = int(binary.metadata.shared)
    if target.gpu.backend == "hip":
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", binary.asm["amdgcn"]))
        spilled = int(found["vgpr_spill_count"]) + int(found["private_segment_fixed_size"])
        return {"registers": int(found["vgpr_count"]), "shared": shared, "spilled": spilled}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "shared": shared, "spilled": found["STACK"] + found["LOCAL"]}


def measure(name: str, cell: str, dtype: str, tf32: bool, B: int, H: int, full: bool) -> list[dict[str, Any]]:
    target, kind = TARGETS[name], getattr(torch, dtype)
    scan = plan.Scan(CELLS[cell], kind, kind == torch.float32 and not tf32, 2 if full else 1, B, H)
    p = plan.plan(scan, target.limits)
    found = []
    for kernel in ("forward_scan", "backward_scan"):
        binary = compiled(kernel, target, scan, p, full)
        found.append(
            {"kernel": kernel, "plan": p._asdict(), **resources(binary, target),
             "most_registers": target.registers, "most_shared": target.limits.shared}
        )
    return found


if __name__ == "__main__":
    print(json.dumps([measure(*spec) for spec in json.loads(sys.argv[1])]))
