"""Compile every Triton kernel for GPUs that need not be there, and print as JSON what each needs of them.

A program of its own, because Triton compiles nothing in a process whose kernels run in its interpreter. The arguments
are architectures and dtypes: python compile_kernels.py 80,90 fp32,bf16,fp16
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FILE = Path(__file__).parents[2] / "knlightning/nn/triton_kernels.py"
WARPS = 8
DTYPES = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
LOW = {"input", "rectified", "convolved", "output", "residual", "grad", "kept", "scaled", "d_input"}
NUMBERS = {"inflation", "eps", "scale", "constant_scale", "slope_scale"}
SIZES = {"pixels", "depth", "height", "width", "depths", "heights", "widths"}
WINDOW = {"kernel_size": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1), "dilation": (1, 1, 1)}
FORMATS = [  # the tiles that are chosen for large tensors, and options
    {"channels_last": True, "relu": True, "kept_output": True, "block_p": 32, "block_c": 128},
    {"channels_last": False, "relu": False, "kept_output": False, "block_p": 128, "block_c": 32},
]
CONSTANTS = {"channels": 256, "threshold": 2**31, **WINDOW, "block": 128, "elements": 16}


def source(kernel, low, options):
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in CONSTANTS | options:
            signature[name], constants[name] = "constexpr", (CONSTANTS | options)[name]
        elif name in NUMBERS:
            signature[name] = "fp32"
        elif name in SIZES:
            signature[name] = "i32"
        else:
            others = {"seed": "*i64", "mask": "*i1"}
            signature[name] = low if name in LOW else others.get(name, "*fp32")
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def usage(cubin):
    """Read registers, shared memory and the stack, which holds spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def main(architectures, dtypes):
    spec = importlib.util.spec_from_file_location("triton_kernels", FILE)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    named = {name: kernel for name, kernel in vars(kernels).items() if name.endswith("_kernel")}
    results = {}
    for (name, kernel), dtype, options, architecture in product(named.items(), dtypes, FORMATS, architectures):
        used = {key: value for key, value in options.items() if key in kernel.arg_names}
        low = DTYPES[dtype] if LOW & set(kernel.arg_names) else ""
        case = f"{name} {low} sm_{architecture} {used}"
        if case not in results:
            target = GPUTarget("cuda", int(architecture), 32)
            compiled = triton.compile(source(kernel, low, used), target=target, options={"num_warps": WARPS})
            results[case] = usage(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*(argument.split(",") for argument in sys.argv[1:]))
