"""Settings that depend on the machine: whether bf16 pays, and how the C library handles freed memory."""

from __future__ import annotations

import ctypes
import time
from functools import cache
from typing import Protocol

import torch

from invirtuo.fit.config import FitConfig
from invirtuo.fit.devices import several

__all__ = ["bf16_pays", "keep_freed_memory", "use_bf16"]


class Precise(Protocol):
    """Settings with a precision: of a fit, or of sampling."""

    @property
    def precision(self) -> str:
        """One of "fp32", "bf16" and "auto"."""


def use_bf16(config: Precise, device: str | None = None) -> bool:
    """Whether a fit, or sampling on a type of device, computes in bf16.

    Several processes on CPUs might disagree and do not measure.
    """
    if config.precision != "auto":
        return config.precision == "bf16"
    if isinstance(config, FitConfig) and several(config):
        return torch.cuda.is_available() and bf16_pays()
    if isinstance(config, FitConfig) and config.accelerator == "cpu":
        device = "cpu"
    return bf16_pays(device)


@cache
def bf16_pays(device: str | None = None) -> bool:
    """Whether matrix products in bf16 are at least 1.3 times faster than in fp32 on this machine, measured once.

    Without a device it is the GPU that is asked, where there is one.
    """
    if device != "cpu" and torch.cuda.is_available():
        is_supported: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return is_supported

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(384, 384, dtype=dtype)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        return sorted(times)[3]  # the median

    return seconds(torch.float32) > 1.3 * seconds(torch.bfloat16)


@cache
def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory instead of handing every large tensor back to the system.

    Otherwise each large activation is mapped and zeroed page by page anew: a fifth of a U-Net's training step on a CPU.
    Done once, when work begins, and only where the C library is glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, 1 << 30)
    mallopt(m_top_pad, 1 << 26)
