"""Hold the architecture: arrows go one way, folders own their libraries, importing the package stays light."""

import ast
import collections
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "jax.experimental.pallas.tpu",
    "orbax",
    "grain",
    "pyarrow",
    "tensorflow_datasets",
    "tensorflow",
    "torch",
    "matplotlib",
    "jax_triton",
    "triton",
    "wandb",
    "mlflow",
    "fsspec",
    "gcsfs",
    "s3fs",
    "aiohttp",
)
OWNERS = {
    "orbax": ["transmamba_jax/checkpoint/"],
    "grain": ["transmamba_jax/data/"],
    "pyarrow": ["transmamba_jax/data/"],
    "tensorflow_datasets": ["transmamba_jax/data/"],
    "jax_triton": ["pallas_kernels/ssd/triton/"],
    "triton": ["pallas_kernels/ssd/triton/"],
    "tensorboardX": ["transmamba_jax/training/"],
    "wandb": ["transmamba_jax/training/"],
    "mlflow": ["transmamba_jax/training/"],
    "etils": ["transmamba_jax/runtime/storage/"],
    "fsspec": ["transmamba_jax/runtime/storage/"],
    "gcsfs": ["transmamba_jax/runtime/storage/"],
    "botocore": ["transmamba_jax/runtime/storage/"],
    "flax": ["transmamba_jax/"],
}
ABOVE_TRAINING = ("training", "compile_only", "study", "calibrate")
LARGEST_ROOT = 16
LONGEST_PATH = 5


def _statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports of a module that run: those of functions too, those for type checkers not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from _statements(node)


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a file imports; of `from a import b`, both a and a.b."""
    names = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def sources() -> dict[str, set[str]]:
    """Return file -> the names that it imports."""
    paths = [*ROOT.glob("transmamba_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]
    return {str(path.relative_to(ROOT)): imports_of(path) for path in paths}


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def graph() -> dict[str, set[str]]:
    """Return module -> the modules of the project that it imports; a package stands for what its `__init__` defines."""
    modules = {_module(file): file for file in sources()}
    edges: dict[str, set[str]] = {}
    for module, file in modules.items():
        found = set()
        for node in _statements(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found.update(full & modules.keys())
                if not full <= modules.keys():
                    found.add(node.module)
        edges[module] = (found & modules.keys()) - {module}
    return edges


@pytest.mark.parametrize("package", OWNERS)
def test_only_its_owner_imports(package: str) -> None:
    users = [name for name, imports in sources().items() if any(i.split(".")[0] == package for i in imports)]
    assert users
    assert [name for name in users if not any(name.startswith(owner) for owner in OWNERS[package])] == []


def test_kernels_import_jax_only() -> None:
    allowed = {"jax", "numpy", "pallas_kernels"} | set(sys.stdlib_module_names)
    for name, imports in sources().items():
        if name.startswith("pallas_kernels/"):
            own = {"triton", "jax_triton"} if name.startswith("pallas_kernels/ssd/triton/") else set()
            assert {module.split(".")[0] for module in imports} <= allowed | own, name


def test_nothing_below_training_imports_it() -> None:
    above = tuple(f"transmamba_jax/{room}/" for room in ABOVE_TRAINING)
    for name, imports in sources().items():
        if not name.startswith(above) and name != "transmamba_jax/__init__.py":
            assert not [module for module in imports if module.startswith("transmamba_jax.training")], name


def test_no_import_cycle() -> None:
    edges = graph()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for imported in sorted(edges[module]):
                visit(imported, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_few_files_from_the_model_to_every_implementation() -> None:
    from pallas_kernels.ssd.api import IMPLEMENTATIONS

    edges = graph()
    files = {"transmamba_jax.model": 1}
    queue = collections.deque(files)
    while queue:
        module = queue.popleft()
        for imported in edges[module] - files.keys():
            files[imported] = files[module] + 1
            queue.append(imported)
    found = {name: files[vars(module)["__name__"]] for name, module in IMPLEMENTATIONS.items()}
    assert max(found.values()) <= LONGEST_PATH, found


def test_the_root_is_the_model() -> None:
    modules = sorted(path.name for path in (ROOT / "transmamba_jax").glob("*.py"))
    assert len(modules) <= LARGEST_ROOT, modules


def test_importing_the_package_is_light() -> None:
    # flax imports orbax's wheel-mates lazily; what counts is that none of these is loaded by the model and kernels.
    code = "import sys, transmamba_jax as tm, pallas_kernels.ssd; tm.TransMamba, tm.generate, tm.load_config\n"
    code += f"print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(each for name in extras if name != "dev" for each in extras[name])]
    normal = lambda name: name.lower().replace("_", "-")
    declared = {normal(re.split(r"[\[<>=!; ]", each)[0]) for each in required}
    files = [path for package in ("transmamba_jax", "pallas_kernels") for path in (ROOT / package).rglob("*.py")]
    imported = {name.partition(".")[0] for path in files for name in imports_of(path)}
    # The Triton packages are extras that not every Python has; the others have to be there.
    providers = {"triton": ["triton"], "jax_triton": ["jax-triton"], **importlib.metadata.packages_distributions()}
    for name in sorted(imported - set(sys.stdlib_module_names) - {"transmamba_jax", "pallas_kernels"}):
        assert {normal(each) for each in providers[name]} & declared, f"pyproject.toml does not declare {name}"
