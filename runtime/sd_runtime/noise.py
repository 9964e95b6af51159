"""Seed → Gaussian noise, equal to torch's: the CPU generator bit for bit, the CUDA generator to float rounding.

A picture is repeatable across programs only if the noise is, so both of torch's generators are written out here:

    CPUGenerator    torch.Generator("cpu").manual_seed(seed)     Mersenne Twister, Box-Muller on blocks of 16
    CUDAGenerator   torch.Generator("cuda").manual_seed(seed)    Philox4x32-10, one counter per element
    NoiseSource     one generator per image, drawn in step, as diffusers does with a list of generators

Both start from uniform 32-bit words and make normals by the Box-Muller transform: for independent uniforms u, v

    r = sqrt(-2 ln u),    (r cos 2πv, r sin 2πv)    are independent and normal.

torch's CPU build evaluates ln, sin and cos in float32 with AVX2 polynomials (those of the Cephes library) and fused
multiply-adds.  Equal bits therefore need the same polynomials in the same order with the same roundings, which is what
the lower half of this module is about.  All of it is IEEE arithmetic, so that the bits do not depend on our machine;
torch's own do: builds without AVX2 (ARM) call the C library instead and differ in the last place.

Sources: Matsumoto & Nishimura 1998 (MT19937); Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
(Philox); ATen/native/cpu/DistributionTemplates.h and avx_mathfun.h; curand_kernel.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import UsageError
from .fields import RNG, SEED_MAX, check_seed
from .tensor import Array

Float32: TypeAlias = NDArray[np.float32]
UInt64: TypeAlias = NDArray[np.uint64]

WORD: Final = 0xFFFFFFFF


class Generator(Protocol):
    """A stream of standard normal numbers; each draw continues where the one before ended."""

    def randn(self, shape: Sequence[int], dtype: DTypeLike = np.float32) -> Array: ...


class NoiseSource:
    """One generator per image: image i's noise depends on `seeds[i]` alone, not on the batch that it is drawn in.

    `seeds` are integers from -2^63 to 2^64 - 1 (0 is a seed; negative ones wrap around as in torch), `rng` is the torch
    device whose noise is meant.  UsageError for anything else.
    """

    def __init__(self, seeds: Sequence[int], rng: RNG = "cpu") -> None:
        if rng not in ("cpu", "cuda"):
            raise UsageError("rng", got=rng, accepted="cpu, cuda")
        make: type[CPUGenerator] | type[CUDAGenerator] = CPUGenerator if rng == "cpu" else CUDAGenerator
        self._generators: tuple[Generator, ...] = tuple(make(seed) for seed in seeds)
        if not self._generators:
            raise UsageError("seeds", got="none", accepted="one integer per image")

    def draw(self, shape_of_one_image: Sequence[int]) -> Float32:
        """The next noise of every image: (B, *shape_of_one_image) float32, B = number of seeds."""
        noise = np.empty((len(self._generators), *shape_of_one_image), np.float32)
        for image, generator in zip(noise, self._generators, strict=True):
            image[...] = generator.randn(shape_of_one_image)
        return noise


class CPUGenerator:
    """torch.Generator("cpu").manual_seed(seed); only the seed's low 32 bits count, as in torch.

    The words come from numpy's RandomState, whose stream is frozen and whose seeding is MT19937's own, like torch's.
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(check_seed(seed) & WORD)
        self._spare: float | None = None  # second half of a pair that a draw of fewer than 16 values left

    def randn(self, shape: Sequence[int], dtype: DTypeLike = np.float32) -> Array:
        """torch.randn(shape, dtype=dtype, generator=…): float32 or float16, successive draws continue the stream."""
        dtype, n = _check_dtype(dtype), math.prod(shape)
        if n < 16:
            return np.array([self._normal() for _ in range(n)], np.float32).astype(dtype).reshape(shape)
        whole = n - n % 16
        # torch turns uniforms into normals in place, 16 at a time: n uniforms, of which a ragged tail stays unused, ...
        uniforms = self._uniforms(n if dtype == np.float32 else whole)  # (float16 does not draw that tail)
        normals = np.empty(n, np.float32)
        normals[:whole] = _box_muller(uniforms[:whole])
        if n % 16:  # ... and then the last 16 values, some for the second time, from fresh ones
            normals[-16:] = _box_muller(self._uniforms(16))
        return normals.astype(dtype, copy=False).reshape(shape)

    def _uniforms(self, n: int) -> Float32:
        """(n,) float32 in [0, 1): the low 24 bits of the next n words."""
        words = self._words.randint(0, 1 << 24, n, dtype=np.uint32)  # full 24-bit range: a mask, nothing is rejected
        return words.astype(np.float32) * np.float32(2**-24)

    def _normal(self) -> float:
        """One value of a draw of fewer than 16: double precision, made in pairs, the second kept for the next call."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        high1, low1, high2, low2 = self._words.randint(0, 1 << 32, 4, dtype=np.uint32).tolist()
        u1, u2 = (((high << 32 | low) & (1 << 53) - 1) * 2**-53 for high, low in ((high1, low1), (high2, low2)))
        radius, angle = math.sqrt(-2 * math.log1p(-u2)), 2 * math.pi * u1
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


class CUDAGenerator:
    """torch.Generator("cuda").manual_seed(seed): Philox with the seed as key and one counter lane per GPU thread.

    A GPU that keeps fewer threads resident than a draw has values makes each thread produce several values, so the
    layout of large draws depends on the GPU: `resident_threads` = SMs · (threads per SM // 256) · 256, for example
    270336 for H100 and H200.  By default every value has a thread of its own, which is what all GPUs do for small
    draws, and AUTOMATIC1111's "NV" noise for all.  Values agree with the GPU's to about 1e-6: it has its own sine.
    """

    def __init__(self, seed: int, resident_threads: int | None = None) -> None:
        self._key = check_seed(seed) & SEED_MAX
        self._resident_threads = resident_threads
        self._offset = 0  # counter steps used so far, the same for every lane

    def randn(self, shape: Sequence[int], dtype: DTypeLike = np.float32) -> Array:
        """torch.randn(shape, dtype=dtype, device="cuda", generator=…): float32, or float16 by rounding that."""
        dtype, n = _check_dtype(dtype), math.prod(shape)
        threads = -(-n // 256) * 256  # blocks of 256
        if self._resident_threads is not None:
            threads = min(threads, self._resident_threads)
        normals = np.empty(n, np.float32)
        # A lane's counter step yields 4 normals, for the elements lane, lane + threads, lane + 2 · threads, ...
        for start in range(0, n, 4 * threads):
            lanes = np.arange(min(threads, n - start), dtype=np.uint64)
            words = philox4x32((self._offset & WORD, self._offset >> 32, lanes, 0), self._key)
            for i in range(4):
                part = normals[start + i * threads : start + (i + 1) * threads]
                if part.size:
                    pair = words[i & ~1][: part.size], words[i | 1][: part.size]
                    part[...] = _curand_normal(*pair, cosine=bool(i & 1))
            self._offset += 1
        return normals.astype(dtype, copy=False).reshape(shape)


def _check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    checked = np.dtype(dtype)
    if checked not in (np.float32, np.float16):
        raise UsageError("noise dtype", got=checked.name, accepted="float32, float16")
    return checked


def philox4x32(counter: Sequence[int | UInt64], key: int, rounds: int = 10) -> tuple[UInt64, UInt64, UInt64, UInt64]:
    """Philox4x32 (Salmon et al. 2011, section 3.3): four 32-bit counter words, each an integer or an array, and a
    64-bit key → four arrays of 32-bit words (kept in uint64, which holds the 32 × 32-bit products)."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    key_low, key_high, half, mask = key & WORD, key >> 32, np.uint64(32), np.uint64(WORD)
    for _ in range(rounds):
        product0, product2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = product2 >> half ^ c1 ^ np.uint64(key_low), product2 & mask
        c2, c3 = product0 >> half ^ c3 ^ np.uint64(key_high), product0 & mask
        key_low, key_high = key_low + 0x9E3779B9 & WORD, key_high + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def _curand_normal(radius_word: UInt64, angle_word: UInt64, *, cosine: bool) -> Float32:
    """curand's Box-Muller: u in (0, 1] and an angle in (0, 2π], both the middles of 2^32 intervals.

    The GPU evaluates ln, sin and cos with fast hardware approximations; here they are rounded once from float64."""
    step = np.float32(2**-32)
    turn = np.float32(step * np.float32(2 * math.pi))
    u = _fma(radius_word.astype(np.float32), step, step / 2)
    angle = _fma(angle_word.astype(np.float32), turn, turn / 2)
    wave = np.cos if cosine else np.sin
    radius: Float32 = np.sqrt(np.float32(-2) * np.log(u, dtype=np.float64).astype(np.float32))
    return radius * wave(angle, dtype=np.float64).astype(np.float32)


# ---- torch's CPU Box-Muller, rounding for rounding -------------------------------------------------------------------

_CHUNK: Final = 16384  # values worked on at once: the temporaries stay in the processor's cache


def _f32(*values: float) -> tuple[float, ...]:
    """Constants rounded to float32, as the C source has them, in Python floats."""
    return tuple(float(np.float32(value)) for value in values)


# Cephes logf, sinf, cosf: minimax polynomials, highest power first.  π/4 is split so that j · π/4 is exact in parts.
_LOG = _f32(
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_LN2_HIGH, _LN2_LOW = _f32(0.693359375, -2.12194440e-4)
_SQRT_HALF, _TWO_PI, _FOUR_OVER_PI = (np.float32(v) for v in (math.sqrt(0.5), 2 * math.pi, 4 / math.pi))
_SIN = _f32(-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = _f32(2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_MINUS_QUARTER_PI = _f32(-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)
_HALF, _ONE = np.float32(0.5), np.float32(1)


def _box_muller(uniforms: Float32) -> Float32:
    """(n,) uniforms in [0, 1) → (n,) normals, n a multiple of 16: in each block of 16, 8 radii, then 8 angles."""
    normals = np.empty_like(uniforms)
    for start in range(0, uniforms.size, _CHUNK):
        block = uniforms[start : start + _CHUNK].reshape(-1, 2, 8)
        radius = np.sqrt(np.float32(-2) * _log(_ONE - block[:, 0]))
        sine, cosine = _sincos(_TWO_PI * block[:, 1])
        out = normals[start : start + _CHUNK].reshape(-1, 2, 8)
        np.multiply(radius, cosine, out=out[:, 0])
        np.multiply(radius, sine, out=out[:, 1])
    normals += np.float32(0)  # torch adds the mean: -0 becomes 0
    return normals


def _fma(a: Float32, b: Float32 | np.float32 | float, c: Float32 | np.float32 | float) -> Float32:
    """float32 fused multiply-add a · b + c, rounded once: float64 holds the product exactly, and the second rounding of
    its sum never matters for the 2^24 uniforms there are (a test tries them all)."""
    result = np.multiply(a, b, dtype=np.float64)
    result += c
    return result.astype(np.float32)


def _log(x: Float32) -> Float32:
    """Natural logarithm of x in (0, 1]: x = 2^e · m with m in [√½, √2), then a polynomial in m - 1."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < _SQRT_HALF
    e = (exponent - low).astype(np.float32)
    m = np.where(low, mantissa + mantissa, mantissa) - _ONE
    square = m * m
    y = np.full_like(m, _LOG[0])
    for coefficient in _LOG[1:]:
        y = _fma(y, m, coefficient)
    y = _fma(y * m, square, e * np.float32(_LN2_LOW)) - square * _HALF
    return _fma(e, _LN2_HIGH, m + y)


def _sincos(x: Float32) -> tuple[Float32, Float32]:
    """sin x and cos x for x in [0, 2π): x = j · π/4 + a small angle with j even, one polynomial for each function."""
    j = (x * _FOUR_OVER_PI).astype(np.int32) + 1 & ~1
    octant = j.astype(np.float32)
    for part in _MINUS_QUARTER_PI:
        x = _fma(octant, part, x)
    square = x * x
    sine = _fma(_fma(_fma(square, _SIN[0], _SIN[1]), square, _SIN[2]) * square, x, x)
    cosine = _fma(_fma(square, _COS[0], _COS[1]), square, _COS[2])
    cosine = _fma(cosine * square, square, -(square * _HALF)) + _ONE
    swap = j & 2 != 0
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    sine.view(np.int32)[...] ^= (j & 4) << 29  # negative in the lower half turn
    cosine.view(np.int32)[...] ^= (j + 2 & 4) << 29  # negative in the left half turn
    return sine, cosine
