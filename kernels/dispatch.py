"""Which implementation an op runs, Triton's kernel or the plain twin: chosen once, said once, never changed in silence.

auto        kernels on a GPU that can run them (compute capability 8.0, Triton 3.6), elsewhere PyTorch's operations
triton      kernels always; on the CPU only in Triton's interpreter (TRITON_INTERPRET=1), which is for tests
reference   the plain twins of `kernels.reference`, always
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Literal, get_args

import torch
from torch import Tensor

Choice = Literal["auto", "triton", "reference"]

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)

_choice: Choice = "auto"


def choose(choice: Choice, device: torch.device) -> str:
    """Make the choice for this process; returns what to say of it, with the reason, for the log.

    Raises ValueError where `triton` was asked for and `device` cannot run it: never a silent fallback.
    """
    global _choice  # noqa: PLW0603
    if choice not in get_args(Choice):
        raise ValueError(f"kernels is {choice!r}: choose one of {', '.join(get_args(Choice))}")
    obstacle = _obstacle(device.type)
    if choice == "triton" and obstacle is not None:
        raise ValueError(f"kernels is 'triton', but {obstacle}: choose 'auto' or 'reference'")
    _choice = choice
    if choice == "reference":
        return "kernels: reference (as configured)"
    if choice == "auto" and (device.type == "cpu" or obstacle is not None):
        return f"kernels: reference ({'on the CPU' if device.type == 'cpu' else obstacle})"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    return f"kernels: triton {importlib.metadata.version('triton')} on {where}"


def chosen() -> Choice:
    """The choice under which ops run now."""
    return _choice


def use_triton(x: Tensor) -> bool:
    """Whether an op on `x`'s device launches its kernel."""
    if _choice == "reference":
        return False
    if _choice == "triton":
        obstacle = _obstacle(x.device.type)
        if obstacle is not None:
            raise ValueError(f"kernels is 'triton', but {obstacle}: choose 'auto' or 'reference'")
        return True
    return x.device.type == "cuda" and _obstacle("cuda") is None


def _obstacle(device_type: str) -> str | None:
    """Why kernels cannot run on such a device; None where they can."""
    return _find_obstacle(device_type)


# Asked while tracing: torch.compile cannot trace what it reads. `torch.compiler.assume_constant_result` sets this too,
# and imports torch._dynamo to do so, which takes every process a second.
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _find_obstacle(device_type: str) -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    from triton import knobs

    if device_type == "cpu":
        return None if knobs.runtime.interpret else "Triton has no CPU kernels, and its interpreter is off"
    if device_type != "cuda":
        return f"Triton has no kernels for {device_type}"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, not 8.0 or newer"
    return None
