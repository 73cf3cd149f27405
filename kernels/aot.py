"""Compile every kernel ahead of time, without a GPU, and show what it takes: `python -m kernels.aot`.

Each `kernels/*_triton.py` lists in `builds()` its kernels as the recipes launch them. For sm_80 and sm_90 a build must
compile, keep nothing on the stack (no register spills), fit the chip's shared memory and, on sm_90, run every matrix
product that is meant for the tensor cores by `wgmma`. `--write` keeps the table in a file; `--check` compiles again and
compares promises and the list of builds with it, not register counts, which move with Triton's version.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import importlib.metadata
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
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
    targets: tuple[int, ...] = TARGETS  # where it is launched so: tiles may differ
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What a build takes on one target."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    dots: int  # matrix products in the machine-level program
    wgmma: int  # of these, by warp groups


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    op: str
    case: str
    target: int
    compiled: Compiled | None  # None where it does not compile
    faults: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.op} ({self.case}) sm_{self.target}"

    @property
    def cells(self) -> tuple[str, ...]:
        """The line's cells, as COLUMNS names them."""
        numbers = ("",) * 4
        if self.compiled is not None:
            taken = self.compiled
            dots = f"{taken.wgmma} / {taken.dots}" if taken.dots else ""
            numbers = (str(taken.registers), str(taken.stack_bytes), str(taken.shared_bytes), dots)
        return (self.op, self.case, f"sm_{self.target}", *numbers, "; ".join(self.faults) or "yes")


COLUMNS = ("op", "case", "target", "registers", "stack bytes", "shared bytes", "wgmma / dots", "ok")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 where every build keeps the promises and, with --check, the file lists them; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", metavar="NAME", help="only the ops whose name begins so")
    parser.add_argument("--quick", action="store_true", help="only the first build of each kernel")
    parser.add_argument("--write", type=Path, metavar="F", help="keep the table in this Markdown file")
    parser.add_argument("--check", type=Path, metavar="F", help="and fail where this file lists others or broken ones")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core)")
    chosen = parser.parse_args(arguments)
    if chosen.write and (chosen.op or chosen.quick):
        parser.error("--write keeps the whole table: leave --op and --quick out")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is 1, and what the interpreter runs cannot be compiled: unset it")

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    builds = [entry for entry in _every_build() if entry.build.op.startswith(chosen.op or "")]
    if not builds:
        parser.error(f"--op is {chosen.op}: there are {', '.join(sorted({e.build.op for e in _every_build()}))}")
    work = [(entry, target) for entry in builds for target in entry.build.targets]
    results = _compile_all(_first_of_each_kernel(work) if chosen.quick else work, chosen.jobs)

    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(*COLUMNS, title=f"Triton {importlib.metadata.version('triton')}")
    for result in results:
        table.add_row(*map(escape, result.cells))
    console.print(table)
    broken = [f"{result.name}: {'; '.join(result.faults)}" for result in results if result.faults]
    if chosen.write:
        chosen.write.write_text(_document(results), encoding="utf-8")
    if chosen.check:
        broken += _differences(chosen.check, [entry.build for entry in builds], chosen.op or "")
        written_by = _said_in(chosen.check, r"with Triton (\S+),")
        if written_by != importlib.metadata.version("triton"):
            console.print(f"{chosen.check} is of Triton {written_by}: its register counts are not these")
    for line in broken:
        console.print(line, style="red", markup=False)
    console.print(f"{len(results)} compiled, {len(broken)} faults")
    return 1 if broken else 0


@dataclass(frozen=True)
class _Entry:
    module: str  # JITFunctions do not pickle: a process of the pool finds its build again
    index: int
    build: Build


@functools.cache
def _builds_of(module: str) -> Sequence[Build]:
    return importlib.import_module(module).builds()


@functools.cache
def _every_build() -> Sequence[_Entry]:
    modules = [f"{__package__}.{path.stem}" for path in _sources()]
    entries = [_Entry(module, index, build) for module in modules for index, build in enumerate(_builds_of(module))]
    names = [key for entry in entries for key in _keys(entry.build)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two builds have the same op, case and target: {twice}")
    return entries


def _keys(build: Build) -> list[tuple[str, str, str]]:
    """How the table names it: the first cells of its lines."""
    return [(build.op, build.case, f"sm_{target}") for target in build.targets]


def _first_of_each_kernel(work: Sequence[tuple[_Entry, int]]) -> list[tuple[_Entry, int]]:
    """For each target."""
    first = dict[tuple[int, int], tuple[_Entry, int]]()
    for entry, target in work:
        first.setdefault((id(entry.build.kernel), target), (entry, target))
    return list(first.values())


def _compile_all(work: Sequence[tuple[_Entry, int]], jobs: int) -> list[Result]:
    """In the order of `work`. Triton's cache makes a second time quick."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    # spawned: a forked child would inherit locks of LLVM's threads
    context = multiprocessing.get_context("spawn")
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(jobs, mp_context=context) as pool,
    ):
        futures = [pool.submit(_compile, entry.module, entry.index, target) for entry, target in work]
        for _ in progress.track(as_completed(futures), total=len(futures), description="compiling"):
            pass
    results = list[Result]()
    for (entry, target), future in zip(work, futures, strict=True):
        try:
            results.append(future.result())
        except BrokenProcessPool:
            results.append(Result(entry.build.op, entry.build.case, target, None, ("a compiling process died",)))
    return results


def _compile(module: str, index: int, target: int) -> Result:
    build = _builds_of(module)[index]
    try:
        compiled = compile_build(build, target)
    except Exception as error:  # whatever the compiler raises is this build's fault, not the table's
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        said = f"does not compile: {type(error).__name__}: {lines[-1]}".replace("|", "/")
        return Result(build.op, build.case, target, None, (said,))
    return Result(build.op, build.case, target, compiled, tuple(faults(build, target, compiled)))


def _document(results: Iterable[Result]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ("---",) * len(COLUMNS))]
    lines += ["| " + " | ".join(result.cells) + " |" for result in results]
    return _HEAD.format(triton=importlib.metadata.version("triton"), digest=_digest()) + "\n".join(lines) + "\n"


_HEAD = """# Ahead of time: what every kernel takes

Printed by `python -m kernels.aot --write docs/results/aot.md` with Triton {triton}, without a GPU. For sm_80 and sm_90
each build must compile, keep nothing on the stack (no register spills), fit the shared memory that one program may ask
for (163 KiB and 227 KiB) and, on sm_90, run by `wgmma` every matrix product that is meant for the tensor cores: exact
fp32 products are not, and show fewer wgmma than dots. In CI, `--check` fails where the builds or their sources (SHA-256
{digest}) are no longer these, or where one of those compiled again breaks a promise. Register counts may move
with Triton's version.

"""


def _sources() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*_triton.py"))


def _digest() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in _sources())).hexdigest()[:16]


def _said_in(path: Path, pattern: str) -> str | None:
    found = re.search(pattern, path.read_text(encoding="utf-8"))
    return found[1] if found else None


def _differences(path: Path, builds: Sequence[Build], prefix: str) -> list[str]:
    """Where `path` lists other builds than `builds`, or a broken one, or is of other sources."""
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split(" | "))
        for line in path.read_text(encoding="utf-8").splitlines()
        if " | sm_" in line
    ]
    listed = {row[:3]: row[-1] for row in rows if row[0].startswith(prefix)}
    ours = {key for build in builds for key in _keys(build)}
    mend = "run python -m kernels.aot --write again"
    stale = _said_in(path, r"SHA-256\s+(\w+)\)") != _digest()
    return [
        *([f"{path} is of other sources than kernels/*_triton.py now are: {mend}"] if stale else []),
        *(f"{path} does not list {' '.join(key)}: {mend}" for key in sorted(ours - listed.keys())),
        *(f"{path} lists {' '.join(key)}, which is no build now: {mend}" for key in sorted(listed.keys() - ours)),
        *(f"{path} lists {' '.join(key)} as broken: {ok}" for key, ok in listed.items() if ok != "yes"),
    ]


if __name__ == "__main__":
    sys.exit(main())
