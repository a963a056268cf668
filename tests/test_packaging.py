"""What an installed wheel holds, and the names by which the packages may be imported."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASSETS = {f"dllm_gym/assets/embedded/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and not path.name.startswith((".", "build", "dist", "runs")):
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif path.is_file():
            shutil.copy(path, tree)
    done = run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, tree, cwd=folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    (info,) = {name.split("/")[0] for name in names} - {"dllm_gym"}
    assert info.startswith("dllm_gym-") and info.endswith(".dist-info")
    sources = {"dllm_gym": "dllm_gym", "agents": "dllm_gym/agents", "eval": "dllm_gym/eval"}
    for folder, inside in sources.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert names >= ASSETS
    pages = [path.name for kind in ("html", "css", "js") for path in (ROOT / "eval" / "report").glob(f"*.{kind}")]
    assert pages and names >= {f"dllm_gym/eval/report/{name}" for name in pages}
    assert not [name for name in names if "test" in name or name.endswith("train_policy.py")]


def test_the_installed_wheel_works_elsewhere(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import dllm_gym, dllm_gym.agents, dllm_gym.agents.trainers.policy.grpo, dllm_gym.eval, gymnasium
loaded = [module for name, module in sys.modules.items() if name.startswith("dllm_gym")]
assert all(module.__file__.startswith({str(target)!r}) for module in loaded)
assert dllm_gym.__path__ == [{str(target / "dllm_gym")!r}]
policy = dllm_gym.agents.make_policy("threshold", threshold=0.9)
env = gymnasium.make_vec("MaskedDiffusion-Countdown-v0", num_envs=2)
print(len(dllm_gym.agents.collect(env, policy, [0, 1, 2])))
try:
    import agents
except ModuleNotFoundError:
    print("no agents")
"""
    done = run("-c", code, cwd=elsewhere)
    assert done.stdout.split("\n")[:2] == ["3", "no agents"], done.stderr


@pytest.mark.parametrize(
    ("statement", "folder", "part"),
    [
        ("import agents", ROOT, "dllm_gym.agents"),
        ("import eval", ROOT, "dllm_gym.eval"),
        ("import {name}.dllm_gym", ROOT.parent, "dllm_gym.dllm_gym"),
    ],
)
def test_other_names_are_refused(statement, folder, part, tmp_path):
    if "{name}" in statement:  # a checkout in a folder called dllm_gym, imported from its parent
        (tmp_path / "dllm_gym").symlink_to(ROOT)
        statement, folder = statement.format(name="dllm_gym"), tmp_path
    done = run("-c", statement, cwd=folder)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError") and part in last


def test_making_an_environment_loads_no_extra():
    code = """
import sys, gymnasium, dllm_gym
from dllm_gym.verify import latex
env = gymnasium.make("MaskedDiffusion-Countdown-v0")
env.reset(seed=0)
env.step(env.action_space.sample())
extras = "stable_baselines3 datasets math_verify peft tensorboard tyro rich matplotlib".split()
assert not [name for name in extras if name in sys.modules], sys.modules.keys() & set(extras)
for name in extras:
    sys.modules[name] = None
def error_of(code):
    try:
        exec(code)
    except ImportError as error:
        return str(error)
print(error_of("import dllm_gym.envs.sb3"))
print(error_of("import dllm_gym.agents.cli"))
print(error_of("import dllm_gym.eval.cli"))
print(error_of("dllm_gym.make_task('gsm8k', 'hub')"))
print(error_of("latex.equal('1 + x', 'x + 2', '')"))
"""
    done = run("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    extras = [line.rpartition("dllm-gym[")[2].partition("]")[0] for line in done.stdout.splitlines()]
    assert extras == ["sb3", "train", "train", "data", "math"], done.stdout
