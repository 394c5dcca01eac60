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


def test_what_gans_need_is_imported_when_it_is_asked_for():
    script = (
        "import sys, wraploop\n"
        "assert not any(name.startswith('wraploop.gan') for name in sys.modules)\n"
        "assert {'gan', 'GANTraining', 'callbacks'} <= set(dir(wraploop))\n"
        "assert not hasattr(wraploop, 'gans')\n"
        "assert wraploop.GANTraining is wraploop.gan.GANTraining\n"
        "from wraploop import *\n"
        "from wraploop import gan as imported\n"
        "assert imported is gan is sys.modules['wraploop.gan']\n"
    )
    subprocess.run([sys.executable, "-c", script], timeout=100, check=True)
