"""What the benchmarks share: the peak memory of a block."""

from __future__ import annotations

import threading

import psutil
import torch


class Memory:
    """Peak resident memory above the start, sampled; on CUDA the allocator's peak."""

    def __enter__(self) -> Memory:
        self.process, self.done = psutil.Process(), threading.Event()
        self.start = self.peak = self.process.memory_info().rss
        if torch.cuda.is_available():
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
        self.bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.peak - self.start
