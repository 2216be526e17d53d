"""What the benchmarks share: times, the peak memory of a block, and a process of its own for each measurement."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")


class Memory:
    """Peak memory above the start: resident, sampled every 10 ms; on CUDA the allocator's."""

    def __enter__(self) -> Memory:
        gc.collect()
        if sys.platform == "linux":  # free memory that the process still holds would hide a part of the peak
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.process, self.done = psutil.Process(), threading.Event()
        self.start = self.peak = self.process.memory_info().rss
        if torch.cuda.is_available():
            self.start = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *args: object) -> None:
        self.done.set()
        self.thread.join()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.peak
        self.bytes = peak - self.start


def timed(function: Callable[..., T], *args: object) -> tuple[float, T]:
    """Return the seconds of a call, and what it returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def in_new_process(function: Callable[..., T], *args: object) -> T:
    """Call in a process of its own: memory that an earlier measurement left behind neither counts nor helps.

    The server imports the libraries once, and each process is a fork of it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchmetrics.retrieval", "transformers.generation.logits_process"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args).result()
