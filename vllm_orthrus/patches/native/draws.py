"""vLLM's random draws, bit for bit: Philox for acceptance, MurmurHash3 for the noise of the Gumbel trick."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vllm_orthrus.patches.native.memory import Array

Floats = NDArray[np.float32]
Words = NDArray[np.uint32]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def accept_draws(seeds: Array, positions: Array) -> Floats:
    """[n] uniform on (0, 1), from the first word of Philox 4x32-10 keyed by the seed, counting by the position."""
    key, counter = seeds.astype(np.uint64), positions.astype(np.uint64)
    k0, k1 = key & _LOW, key >> _HALF
    # A position of 32 bits has no upper word, whatever its sign.
    upper = counter >> _HALF if positions.dtype.itemsize > 4 else np.zeros_like(counter)
    c0, c1, c2, c3 = counter & _LOW, upper, np.zeros_like(counter), np.zeros_like(counter)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> _HALF) ^ c1 ^ k0, b & _LOW, (a >> _HALF) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    word = c0.astype(np.uint32).view(np.int32)
    positive = np.where(word < 0, ~word, word)
    least = np.float32(4.6566127342e-10)
    uniform: Floats = np.maximum(positive.astype(np.float32) * least, least)
    return uniform


def gumbel_noise(seeds: Array, positions: Array, vocabulary: int) -> Floats:
    """[n, vocabulary]: -log(-log(1 - u)), u uniform on (0, 1) by seed, position and token."""
    hashed = _hash(seeds, positions, vocabulary)
    high, low = (hashed >> np.uint32(16)).astype(np.float32), (hashed & np.uint32(0xFFFF)).astype(np.float32)
    high *= np.float32(1.52587890625e-05)
    low += np.float32(0.5)
    low *= np.float32(2.3283064365386963e-10)
    high += low
    noise: Floats = -np.log(-_log1p_neg(high))
    return noise


def gumbel_noise_double(seeds: Array, positions: Array, vocabulary: int) -> NDArray[np.float64]:
    """[n, vocabulary]: -log(-log(u)), from 53 random bits."""
    low = _hash(seeds, positions, vocabulary).astype(np.uint64)
    high = _hash(seeds, positions, vocabulary, domain=0x9E3779B9).astype(np.uint64)
    bits = ((high << _HALF) | low) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 1.1102230246251565e-16
    uniform[uniform == 1.0] -= 1.1102230246251565e-16
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def _log1p_neg(u: Floats) -> Floats:
    """log(1 - u), by the series and the bounds that the kernel has."""
    series = np.full_like(u, 1 / 8)
    for divisor in (7, 6, 5, 4, 3, 2, 1):
        series *= u
        series += np.float32(1 / divisor)
    series *= -u
    direct = np.log(np.maximum(np.float32(1) - u, np.float32(5.960464477539063e-08)))
    return np.where(u < np.float32(0.25), series, direct)


def _hash(seeds: Array, positions: Array, vocabulary: int, domain: int = 0) -> Words:
    """[n, vocabulary] MurmurHash3 of (seed, position, token)."""
    seeds, positions = seeds.astype(np.int64).view(np.uint64), positions.astype(np.int64).view(np.uint64)
    h = np.full(len(seeds), domain, dtype=np.uint32)
    for word in (seeds & _LOW, seeds >> _HALF, positions & _LOW):
        h = _mix(h, _scrambled(word.astype(np.uint32)))
    mixed = _mix(h[:, None], _tokens(vocabulary))
    mixed ^= np.uint32(16)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    return mixed


@lru_cache(maxsize=4)  # the same at every step
def _tokens(vocabulary: int) -> Words:
    return _scrambled(np.arange(vocabulary, dtype=np.uint32))


def _scrambled(word: Words) -> Words:
    return _rotated(word * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)


def _mix(h: Words, scrambled: Words) -> Words:
    mixed = _rotated(h ^ scrambled, 13)
    mixed *= np.uint32(5)
    mixed += np.uint32(0xE6546B64)
    return mixed


def _rotated(word: Words, by: int) -> Words:
    return (word << np.uint32(by)) | (word >> np.uint32(32 - by))
