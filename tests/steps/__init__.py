"""Training steps, one family a file, all on one list."""

from importlib import import_module
from pathlib import Path

from . import registry
from .registry import STEPS, Step

__all__ = ["STEPS", "Step", "registry"]

for _path in sorted(Path(__file__).parent.glob("[!_]*.py")):
    import_module(f"{__name__}.{_path.stem}")
