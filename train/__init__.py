"""Training: what composes kernels, privacy, checkpointing and models into the stages of a run."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "privacy", "checkpointing", "models", "train")


def check_packages() -> None:
    """Refuse to start where Python would import another distribution's package in place of one of ours.

    Hugging Face ships one named `kernels`; which of the two wins depends on how Python was started.
    """
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
        if found != ROOT / package / "__init__.py":
            raise ImportError(
                f"`import {package}` finds {found}, not {ROOT / package}: start from {ROOT}, "
                f"put it first on PYTHONPATH, or uninstall the other package of that name"
            )
