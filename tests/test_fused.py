"""The fused kernel for grids of inner products: its numbers, that it is built for GPUs, and when it is used.

No GPU is needed: Triton's interpreter runs it on the CPU (not in bfloat16, whose products that interpreter gets wrong),
and its compiler builds for GPUs that are not there. What it does on one is checked by `applies`, on first use.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from pyro_contrastive.factors import infonce_log_ratio
from pyro_contrastive.kernels import AnisotropicKernel, PairKernel, VonMisesFisherKernel
from pyro_contrastive.ops import fused, tiles

triton = pytest.importorskip("triton", reason="the fused kernel needs Triton, which PyTorch brings along on Linux")
HERE = Path(__file__).parent
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """Triton decides at import whether it interprets, hence another process."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "fused_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sums_and_gradients_are_those_of_loops_in_double_precision(interpreted):
    """To four roundings of the grid in float32; gradients of float16 to three roundings of 2^-11.

    These are of the weights, of the result, and of the sum with the positives' gradient.
    """
    cases = {name: found for name, found in interpreted.items() if name != "infinite"}
    assert len(cases) == 23
    for name, found in cases.items():
        rounding = 2**-22 * max(1.0, found["largest"])
        assert max(found["errors"]) < rounding + (3 * 2**-11 if name.endswith("float16") else 0.0), (name, found)
        assert len(found["errors"]) >= 2


def test_sums_in_half_precision_are_added_up_in_float32(interpreted):
    for name in ("blocks", "remainders", "shift", "wide"):
        assert max(interpreted[f"{name}, float16"]["errors"][:2]) < 1e-6


def test_items_without_any_partner_have_no_weight(interpreted):
    assert interpreted["infinite"] is True


def build(kernel, dtype: torch.dtype, dim: int, architecture: int, **constants) -> tuple[str, str]:
    """PTX, and the resources of the machine code, for a GPU of this architecture."""
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = Path(nvidia.__file__).parent / "bin"
    options = fused.launch_options(dtype, dim)
    built = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    precision = "tf32" if dtype == torch.float32 else "ieee"
    constants |= {"D": dim, "TERMS": False, "SHIFT": False, "EVEN": True, "PRECISION": precision, **options}
    types = {"A": f"*{DTYPES[dtype]}", "B": f"*{DTYPES[dtype]}", "n": "i32", "dim": "i32", "m": "i32", "shift": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [name in ("n", "dim", "m") or signature[name].startswith("*") for name in kernel.arg_names]
    attributes = {(k,): [["tt.divisibility", 16]] for k, yes in enumerate(aligned) if yes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices of Triton on its own defaults
        source = ASTSource(kernel, signature, constants, attributes)
        code = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=built)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        resources = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert code.metadata.shared < 99 * 1024  # what every GPU since 2020 has for a block
    return code.asm["ptx"], resources


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 64), (torch.float32, 128)]
)
def test_it_is_built_for_gpus_without_spilled_registers(dtype, dim, architecture, tmp_path, monkeypatch):
    from pyro_contrastive.ops import _fused_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    try:
        forward = build(kernels.row_sums, dtype, dim, architecture)
        backward = build(kernels.row_gradients, dtype, dim, architecture, OWN=True, OTHERS=True)
    except (ImportError, FileNotFoundError, TypeError) as error:
        pytest.skip(f"this build of Triton cannot compile for a GPU that is not there: {error}")
    for ptx, resources in (forward, backward):
        assert ("wgmma.mma_async" if architecture == 90 else "mma.sync") in ptx  # tensor cores
        assert int(re.search(r"STACK:(\d+)", resources)[1]) == 0, resources


# --------------------------------------------------------------------------------------------------------------------
# When it is used
# --------------------------------------------------------------------------------------------------------------------


def reference(a, b, row_term=None, column_term=None, *, scale=None, shift=0.0, symmetric=False):
    grid = a.float() @ b.float().mT
    return grid.logsumexp(-1), grid.logsumexp(-2)


@pytest.fixture
def untried():
    fused._trusted.cache_clear()
    yield
    fused._trusted.cache_clear()


CPU = torch.device("cpu")


def test_a_kernel_that_agrees_is_trusted(monkeypatch, untried):
    monkeypatch.setattr(fused, "product_sums", reference)
    assert fused._trusted(CPU, torch.bfloat16, 16)


def test_a_kernel_that_is_wrong_is_not_used_and_says_so(monkeypatch, untried):
    monkeypatch.setattr(fused, "product_sums", lambda a, b, **options: reference(1.05 * a, b))
    with pytest.warns(RuntimeWarning, match=r"the fused kernel is off by .* and tiles are used; please report"):
        assert not fused._trusted(CPU, torch.float16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert not fused._trusted(CPU, torch.float16, 16)


def test_nan_is_not_agreement(monkeypatch, untried):
    monkeypatch.setattr(fused, "product_sums", lambda a, b, **options: reference(a * torch.nan, b))
    with pytest.warns(RuntimeWarning, match="off by nan"):
        assert not fused._trusted(CPU, torch.float16, 16)


def test_a_kernel_that_cannot_be_built_is_not_used_and_says_why(monkeypatch, untried):
    def broken(*args, **options):
        raise RuntimeError("no such architecture")

    monkeypatch.setattr(fused, "product_sums", broken)
    with pytest.warns(RuntimeWarning, match="does not work here, and tiles are used: no such architecture"):
        assert not fused._trusted(CPU, torch.float16, 16)


def minus_distance(rows, columns, shared):
    return -torch.cdist(rows[0], columns[0])


class Laplace(PairKernel):
    def pairs(self, z1, z2):
        return tiles.Pairs(minus_distance, (z1,), (z2,))


class OnGPU:
    """Stands for a tensor on a GPU."""

    def __init__(self, dtype: torch.dtype, dim: int) -> None:
        self.dtype, self.shape, self.device = dtype, (4096, dim), torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "dim", "tf32", "expected"),
    [
        (torch.bfloat16, 128, False, True),
        (torch.float16, 256, False, True),
        (torch.bfloat16, 257, False, False),  # too wide
        (torch.float32, 128, False, False),  # exact float32 is not for tensor cores
        (torch.float32, 128, True, True),
        (torch.float32, 129, True, False),
        (torch.float64, 16, True, False),
    ],
)
def test_it_is_for_products_that_tensor_cores_make(dtype, dim, tf32, expected, monkeypatch):
    monkeypatch.setattr(fused, "_trusted", lambda *key: True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        assert fused.applies(OnGPU(dtype, dim), OnGPU(dtype, dim)) is expected
        assert not fused.applies(OnGPU(dtype, dim), OnGPU(torch.float64, dim))
    finally:
        torch.set_float32_matmul_precision(before)


def test_it_is_not_for_the_cpu():
    z = torch.randn(4, 8).bfloat16()
    assert not fused.applies(z, z)


@pytest.mark.parametrize(
    ("kernel", "options", "expected"),
    [
        (VonMisesFisherKernel(), {}, True),
        (AnisotropicKernel(8), {}, True),
        (VonMisesFisherKernel(), {"tile": 16}, False),  # asked for
        (Laplace(), {}, False),  # no inner product
    ],
    ids=["von Mises-Fisher", "anisotropic", "tile", "distance"],
)
def test_large_grids_of_inner_products_go_to_it(kernel, options, expected, monkeypatch):
    """Where it applies, which here is anywhere; without it the same numbers come by tiles."""
    calls = []

    def sums(a, b, *terms, scale=None, **options):
        calls.append(a.shape)
        grid = a @ b.mT + (terms[0].unsqueeze(-1) + terms[1].unsqueeze(-2) if terms else 0.0)
        return grid.logsumexp(-1), None

    monkeypatch.setattr(fused, "applies", lambda a, b: True)
    monkeypatch.setattr(fused, "product_sums", sums)
    monkeypatch.setattr(tiles, "PLAIN_ELEMENTS", 0)
    z1, z2 = torch.nn.functional.normalize(torch.randn(2, 3, 40, 8), dim=-1)
    value = infonce_log_ratio(kernel(z1, z2, lazy=True), **options)
    assert bool(calls) is expected
    torch.testing.assert_close(value, infonce_log_ratio(kernel(z1, z2)))
