"""The scripts of docs/robustness.md run, in small: a kill, spoilt files, some architectures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def printed_by(script: str, *options: str) -> str:
    """Run a script that forks in a process of its own, where no thread is at work yet."""
    path = Path(__file__).parents[1] / "benchmarks" / script
    done = subprocess.run([sys.executable, path, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_architectures() -> None:
    found = printed_by("architectures.py", "--kinds=[llama,gpt_oss,gemma2,mamba]")
    assert "| exact | 2 | llama, gpt_oss |" in found
    assert "(capped, scaled, or a head of several layers) | 1 | gemma2 |" in found
    assert "refused: takes no tree" in found
    assert "wrong" not in found
    assert "traceback" not in found


def test_torture() -> None:
    found = printed_by("torture.py", "--only=[kills,files]", "--share=0.01", "--seed=1")
    assert "| kills | 1 | 1 as if left alone |" in found
    assert "| files | 100 |" in found
    assert not {"traceback", "wrong", "hangs", "otherwise"} & set(re.findall(r"\w+", found))
