import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.fetch_data import SETS, FetchError, fetch, lay_out_emoji, lay_out_openclipart, main

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fetch_data.py"


def test_emoji_go_to_a_folder_a_category_with_their_names_beside(tmp_path: Path) -> None:
    drawings = tmp_path / "package" / "img" / "google" / "64"
    drawings.mkdir(parents=True)
    for name in ("1f44d.png", "1f44d-1f3fb.png", "1f1e7.png"):
        (drawings / name).write_bytes(name.encode())
    described = [
        {
            "name": "THUMBS UP", "category": "People & Body", "image": "1f44d.png",
            "skin_variations": {"1F3FB": {"image": "1f44d-1f3fb.png"}, "1F3FC": {"image": "not-drawn.png"}},
        },
        {"name": "Bangladesh Flag", "category": "Flags", "image": "1f1e7.png"},
    ]  # fmt: skip
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(described))
    assert lay_out_emoji(tmp_path / "package", tmp_path / "ready") == "3 images of 2 emoji in 2 categories"
    ready = tmp_path / "ready"
    found = {path.relative_to(ready).as_posix(): path.read_text() for path in ready.rglob("*.*")}
    assert found == {
        "flags/1f1e7.png": "1f1e7.png", "flags/1f1e7.txt": "bangladesh flag\n",
        "people_body/1f44d.png": "1f44d.png", "people_body/1f44d.txt": "thumbs up\n",
        "people_body/1f44d-1f3fb.png": "1f44d-1f3fb.png", "people_body/1f44d-1f3fb.txt": "thumbs up\n",
    }  # fmt: skip


def test_openclipart_takes_its_captions_from_the_svgs_it_can_read(tmp_path: Path) -> None:
    svg = (
        '<svg xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><dc:title> A  frog\n</dc:title>'
        "<dc:description>by a pond</dc:description></metadata></svg>"
    )
    for name, drawing in {"frog": svg, "broken": svg[:-4], "bare": "<svg/>"}.items():
        for kind, content in {"png": name, "svg": drawing}.items():
            path = tmp_path / "package" / kind / "animals" / f"{name}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    told = lay_out_openclipart(tmp_path / "package", tmp_path / "ready")
    assert told == "3 images, 1 with captions and 3 with drawings, in 1 categories"
    assert (tmp_path / "ready" / "animals" / "frog.txt").read_text() == "A frog. by a pond\n"
    assert (tmp_path / "ready" / "animals" / "frog.svg").read_text() == svg


@pytest.mark.parametrize(
    ("name", "client"), [("fashion-mnist", "apt-get"), ("emoji", "npm"), ("openclipart", "apt-get")]
)
def test_a_missing_client_is_named_and_nothing_is_left(tmp_path: Path, name: str, client: str) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, str(SCRIPT), name, "--cache", str(cache)]
    done = subprocess.run(command, env={**os.environ, "PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{client} is not installed" in done.stderr and "Traceback" not in done.stderr
    assert list(cache.iterdir()) == []


def test_a_failing_client_is_told_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text("#!/bin/sh\necho first >&2\necho 'no network' >&2\nexit 7\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    with pytest.raises(FetchError, match=r"`npm pack .*` failed \(no network\): install Node.js"):
        fetch("emoji", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_set_that_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "emoji").mkdir()
    assert main(["emoji", "--cache", str(tmp_path)]) == 0
    assert "already in" in capsys.readouterr().out
    assert list((tmp_path / "emoji").iterdir()) == []


def test_a_set_that_was_laid_out_otherwise_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lay_out(_: Path, ready: Path) -> str:
        (ready / "animals").mkdir(parents=True)
        (ready / "animals" / "frog.svg").touch()
        return "1 image"

    monkeypatch.setitem(SETS, "openclipart", lay_out)
    (tmp_path / "openclipart" / "old").mkdir(parents=True)
    fetch("openclipart", tmp_path)
    assert "an earlier version laid it out" in capsys.readouterr().out
    assert [path.name for path in tmp_path.rglob("*")] == ["openclipart", "animals", "frog.svg"]
    fetch("openclipart", tmp_path)
    assert "already in" in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_sets_come_whole(tmp_path: Path) -> None:
    """Needs the network, apt-get, dpkg and npm."""
    fashion, emoji = fetch("fashion-mnist", tmp_path), fetch("emoji", tmp_path)
    with gzip.open(fashion / "train-labels-idx1-ubyte.gz") as file:
        assert len(file.read()) == 8 + 60_000
    assert len(list(emoji.rglob("*.png"))) == len(list(emoji.rglob("*.txt"))) == 3786
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji", "fashion-mnist"]
