"""Peak FLOP/s, memory and bandwidth of a device, from configs/hardware/NAME.yaml: for MFU and the memory plan."""

from __future__ import annotations

import warnings

from pydantic import Field

from train import ROOT
from train.config import PositiveFloat, Section
from train.recipe import ConfigError, read_section

FOLDER = ROOT / "configs" / "hardware"


class PeakFlops(Section):
    """Dense peaks in FLOP/s by data type; null where none is claimed."""

    fp32: PositiveFloat | None
    tf32: PositiveFloat | None
    bf16: PositiveFloat | None


class Hardware(Section):
    """One device; `source` says where its figures come from."""

    name: str
    device_name: str | None = Field(description="torch.cuda.get_device_name() of this device; null for the CPU")
    peak_flops: PeakFlops
    memory_bytes: PositiveFloat | None
    bandwidth: PositiveFloat | None
    source: str


def known_hardware() -> dict[str, Hardware]:
    """Every entry of configs/hardware by name."""
    return {path.stem: read_section(Hardware, path, name=path.stem) for path in sorted(FOLDER.glob("*.yaml"))}


def find_hardware(name: str, device_name: str | None) -> Hardware | None:
    """The entry `name`, or with "auto" the one of `device_name` (null: the CPU).

    An unknown name is a ConfigError. A device without an entry gives None, with a warning: its MFU is "n/a", for a
    neighbour's peak would be a false figure.
    """
    known = known_hardware()
    if name != "auto":
        if name not in known:
            raise ConfigError(f"parallel.hardware is {name!r}: known are auto, {', '.join(known)} (files of {FOLDER})")
        return known[name]
    for hardware in known.values():
        if hardware.device_name == device_name:
            return hardware
    warnings.warn(f"{device_name} has no entry in {FOLDER}: MFU is n/a; add a file for it", stacklevel=2)
    return None
