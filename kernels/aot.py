"""Compile every kernel ahead of time, without a GPU, and show what it takes: `python -m kernels.aot`.

Each `kernels/*_triton.py` lists in `builds()` its kernels as the recipes launch them. For sm_80 and sm_90 a build must
compile, keep nothing on the stack (no register spills), fit the chip's shared memory and, on sm_90, run every matrix
product that is meant for the tensor cores by `wgmma`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = (80, 90)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that one program may ask for


@dataclass(frozen=True)
class Build:
    """One kernel as a configuration launches it."""

    op: str  # "attention.forward"
    case: str  # "D=72 bf16"
    kernel: Any  # triton.JITFunction
    types: Mapping[str, str]  # of each argument that is not a constant: "*bf16", "i32", "fp32"
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: frozenset[str] = frozenset()  # integer arguments that are multiples of 16; pointers all are
    fp_fusion: bool = True  # whether a * b + c may become one rounding
    wgmma: bool = True  # whether its matrix products are meant for sm_90's tensor cores
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What a build takes on one target."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    dots: int  # matrix products in the machine-level program
    wgmma: int  # of these, by warp groups


def compile_build(build: Build, target: int) -> Compiled:
    """Compile for compute capability `target` / 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    signature = {name: build.types.get(name, "constexpr") for name in names}
    missing = [name for name in names if name not in build.types and name not in build.constants]
    if missing:
        raise ValueError(f"{build.op} ({build.case}): no type or constant for {', '.join(missing)}")
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in build.aligned
    }
    options = {
        "num_warps": build.num_warps,
        "num_stages": build.num_stages,
        "enable_fp_fusion": build.fp_fusion,
        **build.options,
    }
    source = ASTSource(build.kernel, signature, dict(build.constants), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    program = compiled.asm["ttgir"]
    wgmma = len(re.findall(r"ttng\.warp_group_dot ", program))
    dots = wgmma + len(re.findall(r"\btt\.dot ", program))
    return Compiled(usage["REG"], usage["STACK"], compiled.metadata.shared, dots, wgmma)


def faults(build: Build, target: int, compiled: Compiled) -> list[str]:
    """What a build breaks of the promises above."""
    found = list[str]()
    if compiled.stack_bytes:
        found.append(f"{compiled.stack_bytes} bytes on the stack")
    if compiled.shared_bytes > SHARED_BYTES[target]:
        found.append(f"{compiled.shared_bytes} bytes of shared memory, the chip has {SHARED_BYTES[target]}")
    if target == 90 and build.wgmma and compiled.wgmma < compiled.dots:
        found.append(f"{compiled.dots - compiled.wgmma} of {compiled.dots} matrix products not by wgmma")
    return found


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in text.stdout.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
