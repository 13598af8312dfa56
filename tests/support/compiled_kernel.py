"""Compile the GPU kernel for a GPU that is not here and print what its accesses are: a line per layout.

Run as a process: whether Triton compiles or interprets is settled when it is imported.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels_common import paged_kv, token_layout
from vcache.kernels import gpu
from vcache.kernels.base import PagedKV
from vcache.kernels.planes import planes_of
from vcache.kernels.triton_copy import copy_words

_POINTERS = ("ids", "chunks", "planes", "row_offsets")


def spilled_bytes(cubin: bytes) -> int:
    """Bytes of local memory that the machine code uses."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    (found,) = re.findall(r"LOCAL:(\d+)", said.stdout)
    return int(found)


def report(name: str, paged: PagedKV, shape: gpu._Shape, capability: int, *, to_chunks: bool) -> str:
    planes = planes_of(paged)
    assert planes is not None
    fixed = gpu.constants(planes, paged.layout.chunk_tokens, shape.block, to_chunks=to_chunks)
    names = copy_words.arg_names
    kinds = {each: "*i64" if each in _POINTERS else "i32" for each in names}
    source = ASTSource(
        fn=copy_words,
        signature={**kinds, **dict.fromkeys(fixed, "constexpr")},
        constexprs={(names.index(each),): value for each, value in fixed.items()},
        attrs={(names.index(each),): [["tt.divisibility", 16]] for each in _POINTERS},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": shape.warps}
    )
    ptx = compiled.asm["ptx"]
    wide = [len(re.findall(rf"{kind}\.global\.(?:v2\.b64|v4\.b32)", ptx)) for kind in ("ld", "st")]
    narrow = len(re.findall(r"st\.global\.b", ptx))
    spilled = spilled_bytes(compiled.asm["cubin"])
    return f"{name} {shape.block}: wide={wide[0]}+{wide[1]} narrow_stores={narrow} spilled={spilled}"


def main() -> None:
    capability = int(sys.argv[1])
    gqa = token_layout(num_layers=2, num_kv_heads=8, head_size=128, chunk_tokens=256)
    latent = token_layout(num_layers=2, num_kv_heads=1, head_size=576, kv_parts=1, chunk_tokens=256)
    for axes, layout in (("kpshd", gqa), ("phs(kd)", gqa), ("psd", latent)):
        paged = paged_kv(axes, layout, pages=8, page_tokens=16)
        for shape in (gpu._SPREAD, gpu._NARROW):
            for to_chunks in (True, False):
                print(report(axes, paged, shape, capability, to_chunks=to_chunks))


if __name__ == "__main__":
    main()
