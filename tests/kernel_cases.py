"""What the tests of the kernels in Gluon draw, and what the assembler says of them."""

import subprocess

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


def assembled(ptx, architecture, folder):
    """What the assembler says: registers, spills, and what it had to make wait."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [nvidia.ptxas.path, f"-arch={architecture}", "-v", str(source), "-o", str(folder / "kernel.cubin")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr
