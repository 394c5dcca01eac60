"""What importing the package costs over importing torch."""

import subprocess
import sys

PRINT_NEW = """
import sys, torch
before = set(sys.modules)
import wraploop
print(*set(sys.modules) - before)
"""
SELDOM_NEEDED = ("statistics", "torch._dynamo", "torch._inductor", "torch.distributed.elastic")


def test_an_import_loads_little_that_torch_has_not():
    done = subprocess.run(
        [sys.executable, "-c", PRINT_NEW], capture_output=True, text=True, timeout=100, check=True
    )
    new = set(done.stdout.split())

    packages = {name.split(".")[0] for name in new} - sys.stdlib_module_names
    assert packages <= {"wraploop", "torch", "tqdm", "numpy", "typing_extensions"}
    assert not new.intersection(SELDOM_NEEDED)
