"""Models that come inside installed packages: found there, compared with the SHA-256 pinned here, run on one core."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from privacy.pii.findings import MissingDetector

MEND = "pip install 'sfumato[pii]'"


def load_model(detector: str, package: str, file: str, sha256: str) -> bytes:
    """The bytes of `file` in an installed `package`, which is not imported.

    Raises MissingDetector, which names `detector`, where it is absent or is not the file that was measured.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDetector(f"the detector {detector!r} needs the package {package}, which is absent: {MEND}")
    path = Path(spec.submodule_search_locations[0], file)
    try:
        model = path.read_bytes()
    except OSError:
        raise MissingDetector(f"the detector {detector!r} needs {path}, which cannot be read: {MEND}") from None
    digest = hashlib.sha256(model).hexdigest()
    if digest != sha256:
        raise MissingDetector(
            f"the detector {detector!r} was measured with {file} of SHA-256 {sha256}, and {path} has {digest}: "
            f"install the version of {package} that has it ({MEND})"
        )
    return model


def open_session(detector: str, model: bytes) -> Any:
    """An onnxruntime.InferenceSession on one thread: processes are what runs side by side."""
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        raise MissingDetector(f"the detector {detector!r} needs onnxruntime, which is absent: {MEND}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
