"""What the tests of the kernels draw, how they compile without interpreting, and what NVIDIA's tools say of what comes out."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from triton.knobs import nvidia

from gracekit.quant._int4_layout import pack_codes, pack_scales


def drawn(outputs, inputs, group_size, dtype):
    """A weight in float64, which holds it exactly, its packed codes and its packed scales, on the GPU."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    codes = torch.randint(-8, 8, (outputs, inputs), generator=generator).to(torch.int8)
    scale = (0.01 * torch.rand(outputs, inputs // group_size, generator=generator) + 1e-3).to(dtype)
    weight = codes.double() * scale.double().repeat_interleave(group_size, dim=1)
    made = weight, pack_codes(codes), pack_scales(scale.float(), group_size, inputs)
    return tuple(tensor.cuda() for tensor in made)


def printed_by(script):
    """What a script prints in a process that interprets no kernel: in one that does, some can no longer be compiled."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", script]
    made = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, check=True, capture_output=True, text=True
    )
    return made.stdout


def assembled(ptx, architecture, folder):
    """What the assembler says: registers, spills, and what it had to make wait."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [nvidia.ptxas.path, f"-arch={architecture}", "-v", str(source), "-o", str(folder / "kernel.cubin")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def disassembled(cubin, folder):
    """The machine code as cuobjdump writes it."""
    source = folder / "compiled.cubin"
    source.write_bytes(cubin)
    command = [nvidia.cuobjdump.path, "-sass", str(source)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
