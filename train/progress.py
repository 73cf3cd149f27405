"""How far a stage is, told to whoever launched it: JSON lines in its folder, which the launch shows as a bar."""

from __future__ import annotations

import json
import time
from pathlib import Path

from train.heartbeat import Heartbeat

_INTERVAL_S = 0.2


class Progress:
    """Appends {"step", "steps", "text", "time"} to `progress.jsonl`, at most every fifth of a second and at the end.

    Each call is a sign of life.
    """

    def __init__(self, folder: Path, heartbeat: Heartbeat | None = None) -> None:
        self.path, self.heartbeat = folder / "progress.jsonl", heartbeat
        self._last = 0.0

    def __call__(self, step: int, steps: int | None, text: str = "") -> None:
        if self.heartbeat is not None:
            self.heartbeat.beat()
        now = time.time()
        if now - self._last < _INTERVAL_S and step != steps:
            return
        self._last = now
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "steps": steps, "text": text, "time": now}) + "\n")
