"""The stand-in for CUDA's runtime, in processes of its own: what it lets through and sees."""

from __future__ import annotations

import pytest
from cuda.processes import COMPILED, run

pytestmark = COMPILED
BEGIN = """
import torch
from cuda.compiled import compiled_backend
from cuda.launch import emulated, launches_left_out
runtime = compiled_backend()
from dense_attn._backends import cuda, reference, table
x, y, eps = torch.randn(3, 300)
"""
PROGRAMS = {
    "shared memory that passes 48 KB with the kernel's own is asked for": """
x = torch.randn(1, 10_200)
with emulated(runtime):
    masked, threshold = cuda.percentile_mask(x, 0.9)
print(torch.equal(masked, reference.percentile_mask(x, 0.9)[0]))
""",
    "the memory behind a storage is out of bounds": """
memory = torch.randn(300)
short = memory.as_strided((300,), (1,))
memory.untyped_storage().resize_(4 * 299)
try:
    with emulated(runtime):
        cuda.ddim_step(short, eps, None, 1.0, 1.0, 1.0)
except Exception as error:
    said = str(error)
    print(type(error).__name__, "outside of every tensor" in said, "ddim_step_kernel" in said)
""",
    "a fault is not taken for a refusal": """
try:
    with emulated(runtime):
        runtime.module = lambda *_: 1 / 0
        try:
            cuda.ddim_step(x, eps, None, 1.0, 1.0, 1.0)
        except RuntimeError as error:
            print(str(error).splitlines()[0])
except ZeroDivisionError as error:
    print("raised at the end")
""",
    "without a launcher nothing runs": """
try:
    cuda.ddim_step(x, eps, None, 1.0, 1.0, 1.0)
except RuntimeError as error:
    print(str(error).splitlines()[0])
""",
    "launches that are left out write nothing": """
torch.use_deterministic_algorithms(True)
with launches_left_out(runtime):
    print(cuda.ddim_step(x, eps, None, 1.0, 1.0, 1.0).isnan().all().item())
""",
    "the table takes the emulated build": """
half = torch.zeros(1, 1, 1, 40).half()
print(cuda.LOAD_ERROR, cuda.DEVICE, cuda.LACKING, table.missing("cuda", "ddim_step"))
print(table.why_not("cuda", "layout_attention", half))
print(table.why_not("cuda", "layout_attention", half[..., :3].float()))
""",
}
EXPECTED = {
    "shared memory that passes 48 KB with the kernel's own is asked for": ["True"],
    "the memory behind a storage is out of bounds": ["Fault True True"],
    "a fault is not taken for a refusal": [
        "the GPU must run the kernel, got ZeroDivisionError: division by zero",
        "raised at the end",
    ],
    "without a launcher nothing runs": ["the GPU must run the kernel, got no launcher is set"],
    "launches that are left out write nothing": ["True"],
    "the table takes the emulated build": [
        "None cpu set() None",
        "[]",
        "['its dtype is float16 or bfloat16, got float32', 'head_dim is a multiple of 8, got 3']",
    ],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_stand_in(program: str) -> None:
    assert run(BEGIN + PROGRAMS[program]).splitlines() == EXPECTED[program]
