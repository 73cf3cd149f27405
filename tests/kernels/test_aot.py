"""Kernels are compiled ahead of time; what breaks a promise is named, and the table that is kept cannot go stale."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kernels.aot import SHARED_BYTES, Build, Compiled, compile_build, faults, main

ROOT = Path(__file__).resolve().parents[2]
TABLE = "docs/results/aot.md"

KERNELS = """
import triton
import triton.language as tl

from kernels.aot import Build


@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def product(x, y, out, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    at = rows * BLOCK + columns
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at), input_precision=PRECISION))


def doubles(block):
    return Build("double", f"BLOCK={block}", double, {"x": "*fp32", "n": "i32"}, {"BLOCK": block})


def products(dtype, block, *, wgmma):
    types = {"x": f"*{dtype}", "y": f"*{dtype}", "out": "*fp32"}
    return Build("product", dtype, product, types, {"BLOCK": block, "PRECISION": "ieee"}, wgmma=wgmma)


def builds():
    return [doubles(64), doubles(BLOCK), products("bf16", 64, wgmma=True), products("fp32", 16, wgmma=FP32_WGMMA)]
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a `kernels` of one file of its own, and this compiler of it."""
    (tmp_path / "kernels").mkdir()
    for name in ("__init__.py", "aot.py"):
        shutil.copy(ROOT / "kernels" / name, tmp_path / "kernels" / name)
    write_kernels(tmp_path, block=128, fp32_wgmma=False)
    return tmp_path


def write_kernels(package: Path, *, block: int, fp32_wgmma: bool) -> None:
    source = KERNELS + f"\n\nBLOCK, FP32_WGMMA = {block}, {fp32_wgmma}\n"
    (package / "kernels/example_triton.py").write_text(source, encoding="utf-8")


def aot(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "kernels.aot", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )


def test_what_breaks_a_promise_is_said() -> None:
    build = Build("op", "case", None, {}, {})
    whole = Compiled(registers=128, stack_bytes=0, shared_bytes=SHARED_BYTES[80], dots=2, wgmma=2)
    assert faults(build, 90, whole) == faults(build, 80, whole) == []
    assert faults(build, 80, Compiled(255, 16, SHARED_BYTES[80] + 1, 2, 0)) == [
        "16 bytes on the stack",
        f"{SHARED_BYTES[80] + 1} bytes of shared memory, the chip has {SHARED_BYTES[80]}",
    ]
    without = Compiled(128, 0, 0, dots=2, wgmma=1)
    assert faults(build, 90, without) == ["1 of 2 matrix products not by wgmma"]
    assert faults(build, 80, without) == []  # it has none
    assert faults(Build("op", "fp32", None, {}, {}, wgmma=False), 90, without) == []


def test_a_build_that_leaves_out_an_argument_is_refused() -> None:
    build = Build("op", "K=64", SimpleNamespace(arg_names=["x", "n", "BLOCK"]), {"x": "*fp32"}, {"BLOCK": 64})
    with pytest.raises(ValueError, match=r"op \(K=64\): no type or constant for n"):
        compile_build(build, 90)


def test_the_table_that_was_written_holds_until_builds_or_sources_change(package: Path) -> None:
    table = package / "aot.md"
    written = aot(package, "--write", str(table))
    assert written.returncode == 0, written.stdout + written.stderr
    text = table.read_text(encoding="utf-8")
    assert text.count("| sm_90 |") == text.count("| sm_80 |") == 4
    bf16 = next(line for line in text.splitlines() if line.startswith("| product | bf16 | sm_90"))
    assert bf16.endswith("| 1 / 1 | yes |")  # by wgmma
    fp32 = next(line for line in text.splitlines() if line.startswith("| product | fp32 | sm_90"))
    assert fp32.endswith("| 0 / 1 | yes |")  # and that one is not meant to be

    checked = aot(package, "--quick", "--check", str(table))
    assert checked.returncode == 0, checked.stdout
    assert "4 compiled, 0 faults" in checked.stdout  # the first build of two kernels, for two targets
    only = aot(package, "--op", "double", "--check", str(table))
    assert (only.returncode, "4 compiled, 0 faults" in only.stdout) == (0, True), only.stdout

    write_kernels(package, block=256, fp32_wgmma=False)
    stale = aot(package, "--quick", "--check", str(table))
    assert stale.returncode == 1
    said = " ".join(stale.stdout.split())
    assert "is of other sources than kernels/*_triton.py now are: run python -m kernels.aot --write again" in said
    assert "does not list double BLOCK=256 sm_80" in said
    assert "lists double BLOCK=128 sm_90, which is no build now" in said


def test_a_build_that_breaks_a_promise_fails_the_run_and_so_does_one_that_does_not_compile(package: Path) -> None:
    write_kernels(package, block=96, fp32_wgmma=True)  # tl.arange takes powers of two
    done = aot(package, "--write", str(package / "aot.md"))
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert "product (fp32) sm_90: 1 of 1 matrix products not by wgmma" in said
    assert "double (BLOCK=96) sm_80: does not compile: CompilationError" in said
    assert "8 compiled, 3 faults" in said
    listed = aot(package, "--op", "product", "--quick", "--check", str(package / "aot.md"))
    assert listed.returncode == 1
    assert "lists product fp32 sm_90 as broken: 1 of 1" in " ".join(listed.stdout.split())


def test_two_builds_of_one_name_and_an_unknown_op_are_refused(package: Path) -> None:
    assert "there are double, product" in aot(package, "--op", "attention").stderr
    write_kernels(package, block=64, fp32_wgmma=False)
    assert "two builds have the same op, case and target: [('double', 'BLOCK=64', 'sm_80')" in aot(package).stderr


def test_the_interpreter_is_no_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        main([])
    assert "what the interpreter runs cannot be compiled: unset it" in capsys.readouterr().err


def test_the_table_lists_every_build_of_these_sources_and_the_first_of_each_kernel_compiles() -> None:
    done = aot(ROOT, "--quick", "--check", TABLE)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_build_compiles_and_keeps_its_promises() -> None:
    done = aot(ROOT, "--check", TABLE)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
