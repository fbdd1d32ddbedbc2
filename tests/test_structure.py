"""The house: imports go down the list of rooms, and light imports stay light."""

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flmjax"
# The floor of every room: a room imports rooms of lower floors.
FLOORS = {
    "config": 1,
    "disk": 1,
    "hardware": 1,
    "interrupt": 1,
    "lock": 1,
    "stderr": 1,
    "text_table": 1,
    "sharding": 2,
    "model": 3,
    "optimizer": 4,
    "data": 4,
    "growth": 5,
    "interop": 5,
    "workdir": 6,
    "evaluation": 7,
    "training": 8,
    "planning": 9,
    "launch": 10,
    "scaling": 10,
    "report": 11,
    "cli": 12,
}
# These know less than their floor allows.
NARROWER = {
    "config": set(),
    "disk": set(),
    "hardware": {"config"},
    "interrupt": set(),
    "lock": {"config", "disk"},
    "stderr": set(),
    "text_table": set(),
    "data": {"config", "disk", "lock", "stderr", "text_table"},
    "workdir": {"config", "disk", "lock", "sharding"},
    "launch": {"config", "planning", "sharding"},
}


def may_import(room: str) -> set[str]:
    return NARROWER.get(room, {other for other, floor in FLOORS.items() if floor < FLOORS[room]})


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, inside functions too."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {str(node.module), *(name for name in names if name in MODULES)}
    return {module for module in modules if module.startswith("flmjax.")}  # flmjax itself has the version


def module_of(path: Path) -> str:
    return ".".join(["flmjax", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def test_files_do_not_import_each_other_in_circles():
    left = {module: imports(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    while leaves := {module for module, others in left.items() if not others}:
        left = {module: others - leaves for module, others in left.items() if module not in leaves}
    assert not left


def rooms_and_files() -> list[tuple[str, Path]]:
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or "__" not in path.name]
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]


@pytest.mark.parametrize(("room", "path"), rooms_and_files(), ids=lambda value: getattr(value, "stem", value))
def test_imports_go_down_the_list_of_rooms(room, path):
    assert room in FLOORS, f"{path} is in no room"
    assert {room_of(module) for module in imports(path)} <= {room, *may_import(room)}, path


def test_no_room_is_empty_and_no_cupboard_is_called_utils():
    assert {room for room, _ in rooms_and_files()} >= FLOORS.keys() - {"interop", "scaling"}
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
