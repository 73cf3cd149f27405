"""`bench.py` prints a table, writes the same as JSON, and fails where a target is missed."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_measurement_is_shown_and_written(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    done = subprocess.run(
        [sys.executable, "scripts/bench.py", "data", "--json", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "data.random_records_a_second" in done.stdout
    written = json.loads(path.read_text(encoding="utf-8"))
    assert set(written) == {"machine", "versions", "commit", "rows"}
    assert [set(row) for row in written["rows"]] == [{"name", "value", "unit", "target", "ok"}]
