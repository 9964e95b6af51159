"""Noise equals torch's: the CPU generator bit for bit against live torch, the CUDA one by known answers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from sd_runtime import noise
from sd_runtime.errors import UsageError
from sd_runtime.noise import CPUGenerator, CUDAGenerator, NoiseSource, philox4x32

TORCH = {np.float32: torch.float32, np.float16: torch.float16}
SEEDS = (0, 1, 42, 2**32 - 1, 2**32, 2**32 + 42, 2**63, 2**64 - 1, -1, -5, -(2**63))
SIZES = (0, 1, 2, 5, 15, 16, 17, 31, 32, 33, 100, 1000, 4 * 17 * 25, 4 * 64 * 64, 4 * 64 * 64 + 6, 70000)


# Without AVX2 torch calls the C library's log, sin and cos instead, which differ in the last place (up to 2.3e-6).
needs_avx2 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch's bits are those of its AVX2 build"
)


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def bits(array: np.ndarray) -> bytes:
    """Equal bytes: tells 0 from -0, which == does not."""
    return array.tobytes()


# ---- CPU -------------------------------------------------------------------------------------------------------------


@needs_avx2
@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("size", SIZES)
def test_cpu_noise_has_torchs_bits_over_successive_draws(size, dtype):
    for seed in SEEDS:
        ours, theirs = CPUGenerator(seed), torch_generator(seed)
        for _ in range(3):
            expected = torch.randn(size, generator=theirs, dtype=TORCH[dtype]).numpy()
            drawn = ours.randn((size,), dtype)
            assert drawn.dtype == expected.dtype
            assert bits(drawn) == bits(expected), f"seed {seed}"


@needs_avx2
def test_twelve_million_values_have_torchs_bits():
    for seed in range(48):
        expected = torch.randn(1 << 18, generator=torch_generator(seed * 89478485)).numpy()
        assert bits(CPUGenerator(seed * 89478485).randn((1 << 18,))) == bits(expected), f"seed {seed}"


@needs_avx2
def test_one_stream_through_draws_of_mixed_sizes_and_dtypes():
    """Small draws keep half a pair for later, and larger ones in between must not disturb it."""
    choose = random.Random(7)
    ours, theirs = CPUGenerator(3), torch_generator(3)
    for _ in range(300):
        size, dtype = choose.choice((1, 2, 3, 7, 15, 16, 19, 64, 333)), choose.choice(tuple(TORCH))
        expected = torch.randn(size, generator=theirs, dtype=TORCH[dtype]).numpy()
        assert bits(ours.randn((size,), dtype)) == bits(expected)


def test_shape_is_kept_and_every_draw_is_ours_to_change():
    generator = CPUGenerator(0)
    first = generator.randn((2, 4, 8, 8))
    copy = first.copy()
    assert first.shape == (2, 4, 8, 8)
    generator.randn((2, 4, 8, 8))[...] = 0
    assert bits(first) == bits(copy)
    assert first.flags.writeable


def fused_multiply_add(a, b, c):
    """a · b + c with exactly one rounding to float32: the float64 sum is rounded to odd (Boldo & Melquiond 2008)."""
    a, b, c = (np.asarray(value, np.float64) for value in (a, b, c))
    product = a * b  # exact: 24 + 24 bits
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)  # Knuth's TwoSum: total + error is the exact sum
    bits = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)
    return (bits + np.where((error != 0) & (bits % 2 == 0), away, 0)).view(np.float64).astype(np.float32)


def test_double_rounding_touches_none_of_the_uniforms_there_are(monkeypatch):
    """A uniform is one of 2^24 values, so that the shortcut in `_fma` can be tried on all of them."""

    def logs_and_waves(uniforms):
        return noise._log(np.float32(1) - uniforms), *noise._sincos(noise._TWO_PI * uniforms)

    for start in range(0, 1 << 24, 1 << 16):
        uniforms = np.arange(start, start + (1 << 16), dtype=np.float32) * np.float32(2**-24)
        quick = logs_and_waves(uniforms)
        with monkeypatch.context() as patch:
            patch.setattr(noise, "_fma", fused_multiply_add)
            exact = logs_and_waves(uniforms)
        assert [bits(values) for values in quick] == [bits(values) for values in exact]


# ---- CUDA ------------------------------------------------------------------------------------------------------------

# torch.manual_seed(0); torch.randn(12, device="cuda"), as AUTOMATIC1111's rng_philox.py documents it.
CUDA_SEED_0 = (
    -0.92466259, -0.42534415, -2.64384387, 0.14518388, -0.12086647, -0.57972564,
    -0.62285122, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497,
)  # fmt: skip

# Random123's kat_vectors, philox4x32 10: counter, key → output.
PHILOX_KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


@pytest.mark.parametrize(("counter", "key", "output"), PHILOX_KNOWN)
def test_philox_known_answers(counter, key, output):
    low, high = (int(word, 16) for word in key.split())
    words = philox4x32([int(word, 16) for word in counter.split()], high << 32 | low)
    assert [int(word) for word in words] == [int(word, 16) for word in output.split()]


def test_cuda_noise_known_answers():
    np.testing.assert_allclose(CUDAGenerator(0).randn((12,)), CUDA_SEED_0, rtol=0, atol=2e-6)


def test_cuda_noise_of_a_small_draw_depends_on_position_and_draw_only():
    small, large = CUDAGenerator(5), CUDAGenerator(5)
    for _ in range(2):
        assert bits(small.randn((4, 5))) == bits(large.randn((4 * 5 * 7,))[:20])


def test_cuda_noise_uses_all_64_bits_of_the_seed_and_wraps_negative_ones():
    assert bits(CUDAGenerator(1).randn((16,))) != bits(CUDAGenerator(2**32 + 1).randn((16,)))
    assert bits(CUDAGenerator(-1).randn((16,))) == bits(CUDAGenerator(2**64 - 1).randn((16,)))


def test_cuda_threads_that_are_fewer_than_values_make_four_each_per_counter_step():
    """The layout of ATen's distribution kernel: thread t's normals go to t, t + threads, t + 2 · threads, ..."""
    threads, n = 512, 5 * 4 * 512 + 300
    drawn = CUDAGenerator(9, resident_threads=threads).randn((n,))
    one_each, used = CUDAGenerator(9), []
    for start in range(0, n, 4 * threads):
        assert bits(drawn[start : start + threads]) == bits(one_each.randn((threads,))[: n - start])
        used.append(start)
    following = CUDAGenerator(9, resident_threads=threads)
    following.randn((n,))
    assert bits(following.randn((threads,))) == bits(one_each.randn((threads,))), "offset advances once per loop"
    assert len(used) == 6


@pytest.mark.parametrize("generator", [CPUGenerator, CUDAGenerator])
def test_noise_is_standard_normal(generator):
    drawn = generator(1).randn((1 << 18,)).astype(np.float64)
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.std() - 1) < 0.01
    assert 4 < abs(drawn).max() < 7


@pytest.mark.parametrize("generator", [CPUGenerator, CUDAGenerator])
def test_float16_is_the_rounded_float32_where_torch_says_so(generator):
    assert bits(generator(1).randn((64,), np.float16)) == bits(generator(1).randn((64,)).astype(np.float16))


# ---- one generator per image ----------------------------------------------------------------------------------------


@needs_avx2
def test_noise_source_equals_diffusers_with_a_list_of_generators():
    from diffusers.utils.torch_utils import randn_tensor

    seeds = [0, 7, 2**64 - 1]
    source, generators = NoiseSource(seeds, "cpu"), [torch_generator(seed) for seed in seeds]
    for _ in range(3):
        expected = randn_tensor((3, 4, 9, 11), generator=generators).numpy()
        drawn = source.draw((4, 9, 11))
        assert drawn.dtype == np.float32
        assert bits(drawn) == bits(expected)


@pytest.mark.parametrize("rng", ["cpu", "cuda"])
def test_an_image_does_not_depend_on_its_batch(rng):
    together, alone = NoiseSource([3, 0], rng), NoiseSource([0], rng)
    for _ in range(2):
        assert bits(together.draw((4, 8, 8))[1]) == bits(alone.draw((4, 8, 8))[0])


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [CPUGenerator, CUDAGenerator, lambda seed: NoiseSource([seed])])
@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.0, True, False, None, "1", np.bool_(True), float("nan")])
def test_a_seed_that_torch_does_not_take_is_refused(make, seed):
    with pytest.raises(UsageError, match=r"seed: got .*accepted an integer from -2\^63 to 2\^64 - 1"):
        make(seed)


def test_numpy_integers_are_seeds():
    assert bits(CPUGenerator(np.int64(-5)).randn((16,))) == bits(CPUGenerator(-5).randn((16,)))


def test_unknown_rng_dtype_and_no_seeds_are_refused():
    with pytest.raises(UsageError, match="rng: got tpu, accepted cpu, cuda"):
        NoiseSource([0], "tpu")
    with pytest.raises(UsageError, match="seeds"):
        NoiseSource([])
    with pytest.raises(UsageError, match="noise dtype: got float64"):
        CPUGenerator(0).randn((16,), np.float64)
