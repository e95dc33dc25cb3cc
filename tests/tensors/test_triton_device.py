"""The Triton kernels compiled for devices, none of which is needed for that: what would be launched is compiled instead, down to machine code.

Run as a script, in a process of its own since under the interpreter nothing compiles, it prints what it compiled as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 99, "sm_90": 99, "gfx942": 64}  # KiB a program may take; 99 is what the least of sm_8x has
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64"}
DOTS = re.compile(r"\b(wgmma\.mma_async\.\S+|mma\.sync\.\S+|v_mfma_\w+|fma\.rn\.f32)")


class Compiler:
    """In the place of a kernel: compiles what is launched, as Triton would specialize it, for every target."""

    def __init__(self, kernel: Any, name: str, targets: tuple[str, ...]) -> None:
        self._kernel, self._name, self._targets = kernel, name, targets
        self.keys: list[str] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Compiler:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self._kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {name: options.pop(name) for name in names if name in options}
        signature, constants, aligned = {}, {}, {}
        for i, param in enumerate(self._kernel.params):
            value, special = given[param.name], not param.do_not_specialize
            if param.is_constexpr or value is None or (special and type(value) is int and value == 1):
                signature[param.name], constants[(i,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[param.name], divisible = POINTERS[value.dtype], special and value.data_ptr() % 16 == 0
            else:
                signature[param.name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
                divisible = special and isinstance(value, int) and value % 16 == 0
            if divisible:
                aligned[(i,)] = [["tt.divisibility", 16]]
        self.keys.append(repr((signature, constants, aligned, options)))
        source = ASTSource(fn=self._kernel, signature=signature, constexprs=constants, attrs=aligned)
        for target in self._targets:
            compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(options))
            assembly = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
            row = {"name": self._name, "target": target, "shared": compiled.metadata.shared, "dots": sorted(set(DOTS.findall(assembly)))}
            print(json.dumps({**row, "machine_code": len(compiled.asm["cubin" if "cubin" in compiled.asm else "hsaco"])}), flush=True)


def compile_products() -> None:
    from quire.tensors import triton_products
    from quire.tensors.packed import PackedLayout
    from quire.tensors.triton_cut import ALWAYS, Cut

    kernels, products = (triton_products._multiply, triton_products._add_parts), triton_products.TritonProducts()

    def launch(name: str, *call: Any, targets: tuple[str, ...] = tuple(TARGETS)) -> str:
        triton_products._multiply = compiler = Compiler(kernels[0], name, targets)
        triton_products._add_parts = adding = Compiler(kernels[1], f"add {name}", targets[:1])
        function, *args = call
        function(*args)
        return compiler.keys[0] + "".join(adding.keys)

    n, k = 4096, 2048
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x, bias = torch.empty(5, k, dtype=dtype, device="meta"), torch.empty(n, dtype=dtype, device="meta")
        launch(f"linear {name}", products.linear, x, torch.empty(n, k, dtype=dtype, device="meta"), bias)
        launch(f"matmul {name}", products.matmul, x, torch.empty(k, n, dtype=dtype, device="meta"), bias)
        launch(f"odd {name}", products.linear, x[:, :129], torch.empty(33, 129, dtype=dtype, device="meta"))
    x = torch.empty(5, k, dtype=torch.float16, device="meta")
    launch("linear float16", products.linear, x, torch.empty(n, k, dtype=torch.float16, device="meta"), targets=("sm_90",))
    for quantization in ("int8", "int4"):
        layout = PackedLayout(n, k, torch.bfloat16, quantization)
        packed = torch.empty(products.packed_bytes(layout), dtype=torch.uint8, device="meta")
        launch(f"linear {quantization}", products.packed, torch.empty(5, k, dtype=torch.bfloat16, device="meta"), packed, layout)
    cut = triton_products.TritonProducts(Cut(ALWAYS))
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x, bias = torch.empty(5, k, dtype=dtype, device="meta"), torch.empty(n, dtype=dtype, device="meta")
        launch(f"cut {name}", cut.linear, x, torch.empty(n, k, dtype=dtype, device="meta"), bias)
    weight, roomy = torch.empty(n, k, dtype=torch.bfloat16, device="meta"), torch.empty(99, k + 5, dtype=torch.bfloat16, device="meta")
    rows = (weight[:1], weight[:16], weight[:900], roomy[:, 3:-2], roomy[:1, 3:-2], weight[:900, :1].expand(900, k), weight[None, :900])
    for one in (products, cut):
        keys = {launch("", one.linear, x, weight, targets=()) for x in rows}
        print(json.dumps({"name": "keys", "count": len(keys)}))


def compile_attention() -> None:
    from quire.tensors.attention import triton as attention
    from quire.tensors.attention.base import LayerPlace, StepInputs, TableInputs
    from quire.tensors.triton_cut import BUSY, Cut
    from tests.tensors.attention_cases import Geometry

    def launch(name: str, geometry: Geometry, *targets: str, apart: tuple[str, ...] = ()) -> None:
        (k_row, v_row), dtype = geometry.rows, geometry.dtype
        k_bytes, v_bytes = (16 * geometry.num_kv_heads * row.num_bytes for row in (k_row, v_row))
        place = LayerPlace(0, 0, 16, geometry.num_kv_heads, k_row, v_row, 0, k_bytes)
        q, k, v, slots, pages = (
            torch.empty(*shape, dtype=kind, device="meta")
            for shape, kind in (
                ((40, geometry.num_heads, geometry.k_dim), dtype), ((40, geometry.num_kv_heads, geometry.k_dim), dtype),
                ((40, geometry.num_kv_heads, geometry.v_dim), dtype), ((40,), torch.int64), ((9, k_bytes + v_bytes), torch.uint8),
            )
        )  # fmt: skip
        integers = [torch.tensor(values, dtype=torch.int32) for values in ([0, 40], [20], [1, 2], [0, 2])]
        step = StepInputs(*integers[:2], (TableInputs(*integers[2:]),))
        kernels = {name: getattr(attention, name) for name in ("_attend", "fold_parts", "_commit")}

        def compile_next(kind: str, targets: tuple[str, ...]) -> None:
            for name, kernel in kernels.items():
                setattr(attention, name, Compiler(kernel, f"{name.strip('_')} {kind}", targets))

        compile_next(name, targets)
        attention.TritonAttention().attend(q, k, v, pages, place, step, geometry.mask())
        attention.TritonAttention().commit(k, v, pages, place, slots)
        compile_next(f"{name}, parts apart", apart)
        attention.TritonAttention(Cut(BUSY)).attend(q, k, v, pages, place, step, geometry.mask())
        for name, kernel in kernels.items():
            setattr(attention, name, kernel)

    launch("bfloat16", Geometry(32, 8, 128, 128), *TARGETS, apart=("sm_90", "gfx942"))
    launch("float16", Geometry(8, 2, 80, 64, torch.float16, window=100, softcap=30.0, sinks=True), "sm_80", "gfx942", apart=("sm_80",))
    launch("float32", Geometry(8, 8, 32, 32, torch.float32, chunk=100), "sm_90")
    launch("bfloat16, large heads", Geometry(8, 4, 256, 256), "sm_90")


def compile_rows() -> None:
    from quire.tensors import triton_rows

    kernels = {name: getattr(triton_rows, name) for name in ("_total", "_softmax", "_normalized")}

    def launch(name: str, kernel: str, run: Callable[[triton_rows.TritonRows], Any], targets: tuple[str, ...] = tuple(TARGETS)) -> str:
        compiler = Compiler(kernels[kernel], f"rows {name}", targets)
        setattr(triton_rows, kernel, compiler)
        run(triton_rows.TritonRows())
        return compiler.keys[0]

    x = torch.empty(5, 3000, dtype=torch.bfloat16, device="meta")
    weight = x[0]
    launch("mean", "_total", lambda rows: rows.total(x.float(), 1 / 3000))
    launch("softmax", "_softmax", lambda rows: rows.softmax(x[:, :8]))
    launch("log softmax", "_softmax", lambda rows: rows.softmax(x, log=True))
    launch("layer norm", "_normalized", lambda rows: rows.normalized(x, weight, weight, 1e-5))
    launch("rms norm", "_normalized", lambda rows: rows.normalized(x, None, None, 1e-5, centred=False))
    many = [torch.empty(count, 3000, dtype=torch.bfloat16, device="meta") for count in (1, 16, 2049)]
    keys = {launch("", "_total", lambda rows, x=x: rows.total(x), ()) for x in (*many, torch.empty(7, 3003, device="meta").bfloat16()[:, 3:])}
    print(json.dumps({"name": "keys", "count": len(keys)}))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-m", "tests.tensors.test_triton_device"], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_everything_compiles_to_machine_code_that_fits(compiled: list[dict[str, Any]]) -> None:
    kernels = [row for row in compiled if row["name"] != "keys"]
    assert {row["target"] for row in kernels} == TARGETS.keys()
    assert len(kernels) == 3 * (4 * 2 + 2) + 2 + 1 + 2 * (3 + 2 + 1 + 1 + 2 + 1) + 3 * 5
    for row in kernels:
        assert row["machine_code"] and row["shared"] <= SHARED[row["target"]] << 10, row
        assert row["dots"] or row["name"].startswith(("add", "commit", "fold", "rows")), row


def test_products_of_a_weight_and_sums_of_a_length_are_one_kernel_for_all_rows(compiled: list[dict[str, Any]]) -> None:
    """Whatever their number, strides and alignment."""
    assert [row["count"] for row in compiled if row["name"] == "keys"] == [1, 1, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_and_matmul_multiply_by_the_same_instructions(compiled: list[dict[str, Any]], dtype: str) -> None:
    for target in TARGETS:
        dots = {row["name"]: row["dots"] for row in compiled if row.get("target") == target}
        assert dots[f"linear {dtype}"] == dots[f"matmul {dtype}"] == dots[f"odd {dtype}"] == dots[f"cut {dtype}"]
        assert len(dots[f"linear {dtype}"]) == 1


if __name__ == "__main__":
    compile_products()
    compile_attention()
    compile_rows()
