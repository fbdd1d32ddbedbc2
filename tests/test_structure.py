"""The house: imports go down the list of rooms, and light imports stay light."""

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flmjax"
ROOMS = (
    "config",
    "sharding",
    "model",
    "growth",
    "data",
    "training",
    "evaluation",
    "scaling",
    "interop",
    "cli",
)
# data stands beside model, sharding and growth: it knows the configuration alone.
MAY_IMPORT = {room: ROOMS[:i] for i, room in enumerate(ROOMS)} | {"data": ("config",), "growth": ROOMS[:3]}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Rooms that a file imports, inside functions too."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {
                f"{node.module}.{alias.name}" if node.module == "flmjax" else str(node.module) for alias in node.names
            }
    return {room_of(module) for module in modules if module.startswith("flmjax.")}  # flmjax itself has the version


def rooms_and_files() -> list[tuple[str, Path]]:
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in ("__init__.py", "__main__.py")]
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]


@pytest.mark.parametrize(("room", "path"), rooms_and_files(), ids=lambda value: getattr(value, "stem", value))
def test_imports_go_down_the_list_of_rooms(room, path):
    assert room in ROOMS, f"{path} is in no room"
    assert imports(path) <= {room, *MAY_IMPORT[room]}, path


def test_no_room_is_empty_and_no_cupboard_is_called_utils():
    assert {room for room, _ in rooms_and_files()} >= {
        "config",
        "model",
        "sharding",
        "growth",
        "data",
        "training",
        "cli",
    }
    assert not list(PACKAGE.rglob("util*.py"))


def test_growth_is_imported_fast_and_without_tensorflow():
    code = (
        "import sys, flmjax.growth.grow; heavy = {'tensorflow', 'seqio', 'torch', 'transformers', 'matplotlib'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    ours = min(cpu_seconds(code) for _ in range(3))
    jax = min(cpu_seconds("import jax") for _ in range(3))
    print(f"import flmjax.growth.grow: {ours:.2f} s of CPU time, jax alone {jax:.2f} s")
    assert ours < 2.0 * jax  # 1.3 measured; TensorFlow alone would make it 4


def cpu_seconds(code: str) -> float:
    """CPU time of a process of its own: a busy machine does not change it much."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_typo_is_answered_before_jax_is_loaded():
    code = "import sys; from flmjax.cli import main; main(['tarin']); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
