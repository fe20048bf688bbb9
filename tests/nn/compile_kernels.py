"""Compile every Triton kernel for a GPU that need not be there, and print as JSON what each needs of it.

Layers are run on a CPU, and each of their kernels is compiled in place of being launched, with the arguments of that
launch. A program of its own, because Triton compiles nothing in a process whose kernels run in its interpreter. The
arguments are the architecture and the dtypes: python compile_kernels.py 90 float32,bfloat16,float16
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from knlightning.nn import fused_kernels, fused_passes, kn_conv
from knlightning.nn.fused_passes import mask_of_seed

CASES = [  # format, channels, spatial sizes, what is around the convolution
    (torch.channels_last, 256, (16, 16), {"relu_input": True, "residual": True}),
    (torch.channels_last, 256, (16, 16), {"relu_output": True, "training": False}),
    (torch.contiguous_format, 64, (32, 32), {"relu_output": True}),
    (torch.contiguous_format, 203, (1, 7), {}),
    (torch.contiguous_format, 3, (4, 4, 4), {"relu_input": True}),
]


class AbsentGPU:
    """What Triton asks of a device before it compiles."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def usage(compiled):
    """Read registers, shared memory and the stack, which holds spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    needs = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return needs | {"shared": compiled.metadata.shared}


def main(architecture, dtypes):
    driver.set_active(AbsentGPU(int(architecture)))
    found = {}

    def compile_in_place_of_launching(kernel, programs, *args, **constants):
        compiled = kernel.warmup(*args, **constants, grid=(programs,), num_warps=fused_passes._WARPS)
        found.setdefault(f"{kernel.fn.__name__} {compiled.hash}", compiled)

    fused_passes._launch = compile_in_place_of_launching
    fused_passes._PROGRAMS = 1  # the tiles of large tensors
    for dtype in dtypes.split(","):
        for memory_format, channels, size, around in CASES:
            x = torch.randn(2, channels, *size).to(getattr(torch, dtype)).contiguous(memory_format=memory_format)
            weight, bias = torch.randn(channels, channels, *(1,) * len(size)).to(x.dtype), torch.randn(channels)
            tensors = [t.requires_grad_() for t in (x, weight, bias)]
            residual = {"residual": torch.randn_like(x)} if "residual" in around else {}
            with fused_kernels(True):
                output = kn_conv(*tensors, **around | residual)
            output.backward(torch.randn_like(output))
            mask_of_seed(torch.tensor([0]), x, 0.05)
    print(json.dumps({case: usage(compiled) for case, compiled in found.items()}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
