"""Arrows go one way, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("orbax", "grain", "tensorflow_datasets", "tensorflow", "torch", "matplotlib", "jax_triton", "triton")
OWNERS = {
    "orbax": ["transmamba_jax/checkpoint.py"],
    "grain": ["transmamba_jax/data/"],
    "tensorflow_datasets": ["transmamba_jax/data/"],
    "flax": ["transmamba_jax/"],
}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def sources() -> dict[str, set[str]]:
    paths = [*ROOT.glob("transmamba_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]
    return {str(path.relative_to(ROOT)): imports_of(path) for path in paths}


@pytest.mark.parametrize("package", OWNERS)
def test_only_its_owner_imports(package: str) -> None:
    users = [name for name, imports in sources().items() if any(i.split(".")[0] == package for i in imports)]
    assert users
    assert [name for name in users if not any(name.startswith(owner) for owner in OWNERS[package])] == []


def test_kernels_import_jax_only() -> None:
    allowed = {"jax", "numpy", "pallas_kernels"} | set(sys.stdlib_module_names)
    for name, imports in sources().items():
        if name.startswith("pallas_kernels/"):
            own = {"triton", "jax_triton"} if Path(name).name.startswith("triton") else set()
            assert {module.split(".")[0] for module in imports} <= allowed | own, name


def test_nothing_below_training_imports_it() -> None:
    for name, imports in sources().items():
        if not name.startswith("transmamba_jax/training/"):
            assert not [module for module in imports if module.startswith("transmamba_jax.training")], name


def test_importing_the_package_is_light() -> None:
    # flax imports orbax's wheel-mates lazily; what counts is that none of these is loaded by the model and kernels.
    code = f"import sys, transmamba_jax, pallas_kernels.ssd; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
