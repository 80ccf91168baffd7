"""Passes over the activations of the gene-wise network on a CPU, each one loop that numba compiles for the processor.

Step by step they would go through memory three times as often. bf16 comes as its bits (uint16), and is computed with in
fp32. Arrays are C-contiguous; n cells, m genes, width w; what is summed is added to what the arrays hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

__all__ = ["back_first", "back_second", "first", "second"]


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled at the first call, and kept for the next process where there is a folder for it."""
    # NaN and infinity pass through: a fit that diverges must be seen
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "arcp", "nsz"}}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:
        return njit(function, **options)


# ---- the four passes -------------------------------------------------------------------------------------------------


@compiled
def first(z: np.ndarray, who: np.ndarray, shift: np.ndarray, a: np.ndarray) -> None:
    """z (n, m, w) += who (m, w) + shift (n, w); a = silu(z)."""
    n, m, w = z.shape
    for i in range(n):
        for g in range(m):
            for j in range(w):
                added = number(who[g, j]) + number(shift[i, j])
                x = number(z[i, g, j]) + added
                z[i, g, j] = entry(x, z)
                a[i, g, j] = entry(x * sigmoid(x), a)


@compiled
def second(z: np.ndarray, read_out: np.ndarray, out: np.ndarray) -> None:
    """out (n, m) = read_out (m, w) . silu(z)."""
    n, m, w = z.shape
    for i in range(n):
        for g in range(m):
            out[i, g] = 0
            total = out[i, g]
            for j in range(w):
                x = number(z[i, g, j])
                total += x * sigmoid(x) * number(read_out[g, j])
            out[i, g] = total


@compiled
def back_second(
    z: np.ndarray, read_out: np.ndarray, d_out: np.ndarray, d_z: np.ndarray, d_read_out: np.ndarray, d_bias: np.ndarray
) -> None:
    """Of :func:`second`: d_z, and sums of it over genes (n, w) and of what concerns the read-out over cells (m, w)."""
    n, m, w = z.shape
    for i in range(n):
        for g in range(m):
            for j in range(w):
                x, d = number(z[i, g, j]), d_out[i, g]
                s = sigmoid(x)
                d_read_out[g, j] += d * x * s
                d *= number(read_out[g, j]) * (s + x * (s - s * s))
                d_bias[i, j] += d
                d_z[i, g, j] = entry(d, d_z)


@compiled
def back_first(z: np.ndarray, d_z: np.ndarray, d_who: np.ndarray, d_shift: np.ndarray) -> None:
    """Of :func:`first`: d_z from what d_z holds, d_a, and sums of it over cells (m, w) and genes (n, w)."""
    n, m, w = z.shape
    for i in range(n):
        for g in range(m):
            for j in range(w):
                x = number(z[i, g, j])
                s = sigmoid(x)
                d = number(d_z[i, g, j]) * (s + x * (s - s * s))
                d_who[g, j] += d
                d_shift[i, j] += d
                d_z[i, g, j] = entry(d, d_z)


# ---- numbers, and the entries of arrays that stand for them ----------------------------------------------------------


def number(x: Any) -> Any:
    """The number that an entry stands for."""


def entry(x: Any, like: Any) -> Any:
    """The entry of an array like another that stands for a number; bf16 is rounded to even."""


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)); in fp32 by the rational approximation of tanh in Eigen, to 1e-7."""


@overload(number, strict=False)
def _number(x: Any) -> Callable[..., Any]:
    return (lambda x: float_of(np.uint32(x) << np.uint32(16))) if x == types.uint16 else lambda x: x


@overload(entry, strict=False)
def _entry(x: Any, like: Any) -> Callable[..., Any]:
    def rounded(x: Any, like: Any) -> Any:
        bits = bits_of(np.float32(x))
        is_odd = (bits >> np.uint32(16)) & np.uint32(1)
        to_even = np.uint32(0x7FFF) + is_odd
        return np.uint16((bits + to_even) >> np.uint32(16))

    return rounded if like.dtype == types.uint16 else lambda x, like: x


def bitcast(source: Any, target: Any, llvm_target: ir.Type) -> Any:
    """A function that sees the bits of one type as another."""

    @intrinsic
    def cast(_: Any, x: Any) -> Any:
        return target(source), lambda _, builder, __, given: builder.bitcast(given[0], llvm_target)

    return cast


float_of = bitcast(types.uint32, types.float32, ir.FloatType())
bits_of = bitcast(types.float32, types.uint32, ir.IntType(32))

# numerator and denominator of tanh, in powers of the square
P = [4.89352456e-3, 6.37261929e-4, 1.48572236e-5, 5.12229709e-8, -8.60467152e-11, 2.00018790e-13, -2.76076848e-16]
Q = [4.89352519e-3, 2.26843463e-3, 1.18534706e-4, 1.19825839e-6]


@overload(sigmoid, strict=False)
def _sigmoid(x: Any) -> Callable[..., Any]:
    half, limit = np.float32(0.5), np.float32(8)
    p, q = tuple(map(np.float32, P)), tuple(map(np.float32, Q))

    def approximate(x: Any) -> Any:
        h = half * x
        h = limit if h > limit else h
        h = -limit if h < -limit else h
        s = h * h
        above, below = p[6], q[3]
        for i in range(6):
            above = above * s + p[5 - i]
        for i in range(3):
            below = below * s + q[2 - i]
        return half + half * h * above / below

    return approximate if x == types.float32 else lambda x: 1 / (1 + math.exp(-x))
