"""The rooms of the code: imports go down a list, and nowhere in a circle. `docs/design.md` shows the list."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = """
dllm_gym.types dllm_gym.extras dllm_gym.names dllm_gym.files dllm_gym.hub dllm_gym.oracle_joint dllm_gym.registration
dllm_gym.rendering dllm_gym.rewards dllm_gym.transfer dllm_gym.decoding
dllm_gym.verify
dllm_gym.tasks dllm_gym.denoisers
dllm_gym.envs
agents.workers agents.terminal
agents.environment agents.samplers
agents.evaluation
agents.trainers
agents.trainers.policy agents.trainers.denoiser
agents.trainers.joint agents.trainers.joint_trace agents.cli
agents.push
eval.command eval.metrics eval.presets eval.results
eval.film eval.tables
eval.evaluate eval.compare
eval.report eval.experiments eval.benchmarks
eval.gpu
eval.cli
"""
"""From the bottom to the top. A room imports from lines above its own, and from itself."""
LEVELS = {room: level for level, line in enumerate(ROOMS.strip().splitlines()) for room in line.split()}
LAZY = {"dllm_gym", "agents", "eval"}
"""Packages whose ``__init__`` imports by name on first use."""


def modules() -> dict[str, Path]:
    paths = [path for folder in ("dllm_gym", "agents", "eval") for path in (ROOT / folder).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: path for path, name in names.items()}


def imports_of(path: Path, known: dict[str, Path], top_level: bool = False) -> set[str]:
    """Modules of the project that a file imports; only those that are loaded with it if ``top_level``."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            candidates = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module] * len(node.names)
        elif isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        else:
            continue
        short = [name.replace("dllm_gym.agents", "agents").replace("dllm_gym.eval", "eval") for name in candidates]
        inner = [name for name in short if name in known]
        found.update(name for name in inner if not any(other.startswith(f"{name}.") for other in inner))
    return found


def room_of(module: str) -> str:
    rooms = [room for room in LEVELS if module == room or module.startswith(f"{room}.")]
    assert rooms, f"{module} is in no room"
    return max(rooms, key=len)


def test_imports_go_down_the_list():
    known = modules()
    wrong = []
    for module, path in known.items():
        if module in LAZY or module.endswith("__main__"):
            continue
        mine = room_of(module)
        for other in imports_of(path, known) - LAZY:
            theirs = room_of(other)
            if theirs != mine and LEVELS[theirs] >= LEVELS[mine]:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_no_module_imports_itself_by_a_detour():
    known = modules()
    graph = {module: imports_of(path, known, top_level=True) for module, path in known.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
