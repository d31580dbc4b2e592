"""Every Triton launch compiles for the H200: no spill, fits shared memory, uses wgmma.

Compiled in a subprocess, because this one may run Triton's interpreter.
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
    "_choose_kernel",
    "_lay_out_kernel",
    "_permute_kernel",
    "_combine_kernel",
    "_grouped_product_kernel",
    "_add_rmsnorm_kernel",
    "_attention_kernel",
    "_tree_kernel",
}
Report = dict[str, Any]


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
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
    assert {r["kernel"] for r in products} == {"_grouped_product_kernel", "_attention_kernel"}
    assert [report for report in products if report["num_wgmma"] == 0] == []
