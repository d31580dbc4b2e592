"""Every Triton launch compiles for the H200: no spill, fits shared memory, uses wgmma.

Compiled in a subprocess, because this one may run Triton's interpreter: by the Triton that is
installed, and by each other one that TRIMOE_TRITON names (a folder with an unpacked wheel).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("compile_sm90.py")
ROOT = SCRIPT.parents[2]
SHARED_BYTES_PER_BLOCK = 232_448  # 227 KiB, compute capability 9.0
KERNELS = {
    "_route_kernel",
    "_combine_kernel",
    "_product_kernel",
    "_product_fp8_kernel",
    "_wide_fp8_kernel",
    "_narrow_kernel",
    "_inner_grad_kernel",
    "_row_grad_kernel",
    "_weight_grad_kernel",
    "_add_rmsnorm_kernel",
    "_attention_kernel",
    "_tiles_kernel",
    "_grad_kernel",
    "_delta_kernel",
    "_add_parts_kernel",
    "_join_kernel",
    "_pool_kernel",
    "_mean_kernel",
    "_score_kernel",
    "_choose_blocks_kernel",
    "_listed_kernel",
    "_tree_kernel",
    "_arrange_kernel",
    "_swiglu_kernel",
    "_gate_up_kernel",
    "_down_kernel",
}
WARP_GROUP_KERNELS = {
    "_product_kernel",
    "_product_fp8_kernel",
    "_wide_fp8_kernel",
    "_narrow_kernel",
    "_inner_grad_kernel",
    "_row_grad_kernel",
    "_weight_grad_kernel",
    "_attention_kernel",
    "_tiles_kernel",
    "_grad_kernel",
    "_listed_kernel",
    "_score_kernel",
    "_swiglu_kernel",
    "_gate_up_kernel",
    "_down_kernel",
}
SMALL_PRODUCTS = {"_route_kernel"}  # of too few tokens for a warp group
FEW_ROWS = {("_narrow_kernel", 16), ("_narrow_kernel", 32)}  # a warp group takes 64
OTHER_TRITONS = [path for path in os.environ.get("TRIMOE_TRITON", "").split(os.pathsep) if path]
Report = dict[str, Any]


@pytest.fixture(scope="module", params=["", *OTHER_TRITONS])
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Report]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [request.param])])
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_compiled(reports: list[Report]) -> None:
    assert {report["kernel"] for report in reports} == KERNELS


def test_no_kernel_spills(reports: list[Report]) -> None:
    assert [r for r in reports if r["stack_bytes"] > 0 or r["local_bytes"] > 0] == []


def test_shared_memory_fits_one_block(reports: list[Report]) -> None:
    assert [r for r in reports if r["shared_bytes"] > SHARED_BYTES_PER_BLOCK] == []


def test_matrix_products_run_on_warp_groups(reports: list[Report]) -> None:
    products = [report for report in reports if report["num_dot"] > 0]
    assert {r["kernel"] for r in products} == WARP_GROUP_KERNELS | SMALL_PRODUCTS
    grouped = [report for report in products if report["kernel"] in WARP_GROUP_KERNELS]
    without = [report for report in grouped if report["num_wgmma"] == 0]
    assert {(report["kernel"], report["rows"]) for report in without} == FEW_ROWS
