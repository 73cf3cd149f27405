"""Which implementation runs is chosen once and said; what cannot run is refused, never replaced in silence."""

import importlib.metadata
from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = dispatch.chosen()
    dispatch._find_obstacle.cache_clear()
    yield
    dispatch._find_obstacle.cache_clear()
    dispatch.choose(before, CPU)


def installed(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)


def gpu(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A GPU of that capability, as far as dispatch asks; returns what stands for a tensor on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Invented 1")

    class OnGpu:
        device = torch.device("cuda", 0)

    return OnGpu()  # type: ignore[return-value]


def test_auto_on_the_cpu_is_the_twin_and_says_why() -> None:
    assert dispatch.choose("auto", CPU) == "kernels: reference (on the CPU)"
    assert not dispatch.use_triton(torch.ones(1))


def test_auto_on_a_gpu_is_triton_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = gpu((9, 0), monkeypatch)
    installed("3.6.0", monkeypatch)
    assert dispatch.choose("auto", on_gpu.device) == "kernels: triton 3.6.0 on Invented 1"
    assert dispatch.use_triton(on_gpu)
    assert not dispatch.use_triton(torch.ones(1))


def test_reference_is_the_twin_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = gpu((9, 0), monkeypatch)
    assert dispatch.choose("reference", on_gpu.device) == "kernels: reference (as configured)"
    assert not dispatch.use_triton(on_gpu)


@pytest.mark.parametrize(
    ("version", "reason"), [("3.5.1", "Triton 3.5.1 is older than 3.6"), (None, "Triton is not installed")]
)
def test_a_triton_too_old_or_missing_is_said_and_the_twin_used(
    version: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = gpu((9, 0), monkeypatch)
    installed(version, monkeypatch)
    assert dispatch.choose("auto", on_gpu.device) == f"kernels: reference ({reason})"
    assert not dispatch.use_triton(on_gpu)
    with pytest.raises(ValueError, match=reason):
        dispatch.choose("triton", on_gpu.device)


def test_a_gpu_too_old_is_said_and_the_twin_used(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = gpu((7, 5), monkeypatch)
    said = dispatch.choose("auto", on_gpu.device)
    assert said == "kernels: reference (Invented 1 has compute capability 7.5, not 8.0 or newer)"
    assert not dispatch.use_triton(on_gpu)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("triton", CPU).endswith("on the interpreter")
    assert dispatch.use_triton(torch.ones(1))
    dispatch._find_obstacle.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="its interpreter is off"):
        dispatch.choose("triton", CPU)
    with pytest.raises(ValueError, match="its interpreter is off"):
        dispatch.use_triton(torch.ones(1))


def test_what_triton_has_no_kernels_for_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernels for meta"):
        dispatch.choose("triton", torch.device("meta"))
    with pytest.raises(ValueError, match="kernels is 'fast': choose one of auto, triton, reference"):
        dispatch.choose("fast", CPU)  # type: ignore[arg-type]


def test_a_refused_choice_changes_nothing() -> None:
    dispatch.choose("reference", CPU)
    with pytest.raises(ValueError, match="no kernels for meta"):
        dispatch.choose("triton", torch.device("meta"))
    assert dispatch.chosen() == "reference"
