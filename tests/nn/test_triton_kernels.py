import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from knlightning.nn import triton_kernels
from knlightning.nn.fused_passes import mask_of_seed

SHARED_MEMORY = 99 * 1024
"""Bytes that one program may take on sm_86 and sm_89, the least of those since sm_80."""


def philox(counter, key):
    """Philox-4x32-10, from its paper (Salmon et al., SC 2011): words [..., 4] of counters [..., 4] and a key of two."""
    low, c, k = np.uint64(2**32 - 1), counter.astype(np.uint64), np.array(key, dtype=np.uint64)
    for _ in range(10):
        first, second = (np.uint64(factor) * c[..., i] for factor, i in ((0xD2511F53, 0), (0xCD9E8D57, 2)))
        words = second >> np.uint64(32) ^ c[..., 1] ^ k[0], second, first >> np.uint64(32) ^ c[..., 3] ^ k[1], first
        c = np.stack([word & low for word in words], -1)
        k = k + np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64) & low
    return c


def test_the_generator_of_the_tests_gives_its_published_values():
    """Two of the vectors `kat_vectors` that come with the authors' Random123."""
    zero, ones = np.zeros(4, np.uint64), np.full(4, 2**32 - 1, np.uint64)
    assert [f"{word:08x}" for word in philox(zero, (0, 0))] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    expected = ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    assert [f"{word:08x}" for word in philox(ones, (2**32 - 1,) * 2)] == expected


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("seed", [-7, 2**40 + 3])
def test_a_mask_is_a_function_of_seed_and_place_alone(seed, memory_format):
    shape, p = (2, 6, 3, 5), 0.3
    mask = mask_of_seed(torch.tensor([seed]), torch.empty(shape, memory_format=memory_format), p)
    pixels, groups = 2 * 15, 2  # six channels take two groups of four
    counters = np.zeros((pixels * groups, 4), np.uint64)
    counters[:, 0] = np.arange(pixels * groups)
    words = philox(counters, (seed % 2**32, (seed >> 32) % 2**32)).reshape(2, 15, 8)[..., :6]
    expected = torch.tensor(words.swapaxes(1, 2) >= round(p * 2**32)).reshape(shape)
    assert torch.equal(mask, expected)
    assert mask.stride() == torch.empty(shape, memory_format=memory_format).stride()


@triton.jit
def offsets_kernel(out, image, pixels, channels: tl.constexpr, last: tl.constexpr):
    tile = triton_kernels._offsets(image.to(tl.int64), tl.arange(0, 2), tl.arange(0, 4), pixels, channels, last)
    tl.store(out + tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :], tile)


@pytest.mark.parametrize("last", [True, False])
def test_places_in_tensors_of_more_than_2_to_the_31_elements(last):
    image, pixels, channels = 70_000, 50_000, 4
    out = torch.zeros(2, 4, dtype=torch.int64)
    offsets_kernel[(1,)](out, image, pixels, channels, last)
    start = image * pixels * channels
    expected = [[start + (p * channels + c if last else c * pixels + p) for c in range(4)] for p in range(2)]
    assert out.tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_every_kernel_compiles_for_gpus_without_spilled_registers(architecture):
    program = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(program.parents[2])}
    result = subprocess.run(
        [sys.executable, program, architecture, "float32,bfloat16,float16"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    needs = json.loads(result.stdout)
    names = [case.split()[0] for case in needs]
    assert set(names) == {name for name in vars(triton_kernels) if name.endswith("_kernel")}
    assert min(names.count(f"{name}_kernel") for name in ("pixel_moments", "normalize", "scale_gradient")) >= 3 * 4
    assert {case: need for case, need in needs.items() if need["stack"] or need["local"]} == {}
    assert max(need["shared"] for need in needs.values()) < SHARED_MEMORY
