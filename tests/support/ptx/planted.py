"""A kernel with a planted fault, and its mended twin."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from ptx import Fault, Module, TensorMap

KERNEL = """
.version 8.6
.target {target}
.address_size 64
.visible .entry planted(.param .u64 x_param, .param .u64 out_param,
    .param .align 64 .b8 from_param[128], .param .align 64 .b8 to_param[128])
.reqntid {threads}
{{
    .shared .align 1024 .b8 memory[4096];
    .reg .pred %p<4>;
    .reg .b32 %r<16>, %t, %t4, %cta, %s, %own, %other;
    .reg .b64 %x, %out, %offset, %from, %to, %a, %b;
    .reg .f32 %f<8>;
    ld.param.u64 %x, [x_param];
    ld.param.u64 %out, [out_param];
    mov.u32 %t, %tid.x;
    mov.u32 %cta, %ctaid.x;
    mov.u32 %s, memory;
    shl.b32 %t4, %t, 2;
    add.u32 %own, %s, %t4;
    xor.b32 %other, %t4, 128;
    add.u32 %other, %other, %s;
    cvt.u64.u32 %offset, %t4;
    add.s64 %from, %x, %offset;
    add.s64 %to, %out, %offset;
{body}
    ret;
}}
"""
S32 = 3  # of tensormap.replace
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def rotated(x: Tensor) -> Tensor:
    """The values of the other warp's threads."""
    return x.roll(32)


@dataclass(frozen=True)
class Planted:
    """A kernel's body, in which the broken twin alone has the lines after a "-", the mended one
    alone those after a "+".
    """

    body: str
    expected: Callable[[Tensor], Tensor] = rotated  # of x, the mended results
    threads: int = 64
    programs: int = 1
    target: str = "sm_80"
    faults: bool = True  # else its results are wrong

    def text(self, sign: str) -> str:
        """The PTX of a twin."""
        lines = [line for line in self.body.splitlines() if line.strip()[:1] != "+-".strip(sign)]
        body = "\n".join(line.replace(sign, " ", 1) if _signed(line) else line for line in lines)
        return KERNEL.format(body=body, threads=self.threads, target=self.target)

    def run(self, sign: str, order: str) -> tuple[Tensor, Tensor]:
        """(results, what they have to be) of a twin."""
        x = torch.arange(self.threads, dtype=torch.int32) * 3 + 100
        out = torch.full_like(x, -1)
        module, grid, block = Module(self.text(sign)), (self.programs, 1, 1), (self.threads, 1, 1)
        maps = [TensorMap(y, S32, y.shape, (4,), (64,)) for y in (x, out)]
        module.launch("planted", [x, out, *maps], grid, block, order=order)
        return out, self.expected(x)

    def check(self, order: str) -> None:
        """Require that the mended twin's results are right, and that the broken one is found."""
        result, expected = self.run("+", order)
        assert torch.equal(result, expected), result
        assert self._found(order), "the fault was not found"

    def _found(self, order: str) -> bool:
        try:
            result, expected = self.run("-", order)
        except Fault:
            return True
        return not self.faults and not torch.equal(result, expected)


def _signed(line: str) -> bool:
    return line.strip()[:1] in ("+", "-")


def assemble(texts: Iterable[str], name: str, target: str, folder: Path) -> None:
    """Have Triton's own ptxas assemble kernels of one name."""
    bodies = []
    for i, text in enumerate(texts):
        head, body = text.split(".visible", 1)
        bodies.append(
            ".visible" + body.replace(f"{name}(", f"kernel_{i}(").replace("_param", f"_{i}")
        )
    file = folder / "kernels.ptx"
    file.write_text(head + "".join(bodies))
    command = [PTXAS, f"-arch={target}", file, "-o", folder / "kernels.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
