"""Measures this machine's peaks, and prints them as one line of JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import worker
from roofline import Machine


def measure_peaks(seconds: float = 0.5) -> Machine:
    """The best of some repetitions: of a large matrix product and a convolution, and of a large copy.

    Not every library's matrix product uses all that every CPU has, hence two operations from two libraries.
    """
    size, images, channels, side = 1536, 4, 256, 32
    a, b = torch.ones(size, size), torch.ones(size, size)
    x = torch.ones(images, channels, side, side).contiguous(memory_format=torch.channels_last)
    kernel = torch.ones(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    convolution = 2 * images * channels * channels * (side - 2) ** 2 * 9
    with torch.no_grad():
        product_rate = 2 * size**3 / _best(lambda: a @ b, seconds)
        convolution_rate = convolution / _best(lambda: F.conv2d(x, kernel), seconds)
    copied = 2 * source.numel() * source.element_size()
    bandwidth = copied / _best(lambda: target.copy_(source), seconds)
    return Machine(max(product_rate, convolution_rate), bandwidth, torch.backends.cpu.get_cpu_capability())


def _best(operation: Callable[[], object], seconds: float) -> float:
    """CPU seconds, of all threads, of the best repetition."""
    operation()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.process_time()
        operation()
        best = min(best, time.process_time() - start)
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    threads = parser.parse_args().threads
    worker.pin(threads)
    torch.set_num_threads(threads)
    print(json.dumps(measure_peaks()._asdict()))
