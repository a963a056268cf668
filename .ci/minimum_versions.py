"""Run the tests on the oldest versions that setup.cfg promises; its arguments go to pytest.

    python .ci/minimum_versions.py

The versions are those after ``>=`` in setup.cfg, and torch as constraints.txt pins it. They are installed into
``.venv-minimum``.
"""

import configparser
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-minimum"
TOOLS = ("setuptools", "ruff", "mypy", "mkdocs-material", "mkdocstrings-python")
"""What builds the package or is not run by the tests."""


def minimum_versions() -> list[str]:
    """``name==version`` of every requirement with a minimum."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = "\n".join([config["options"]["install_requires"], *config["options.extras_require"].values()])
    minima = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", required, re.MULTILINE))
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    return [f"{name}=={pinned[name] if name == 'torch' else minima[name]}" for name in minima if name not in TOOLS]


def main() -> int:
    versions = minimum_versions()
    print("\n".join(versions))
    venv.create(FOLDER, with_pip=True)
    python = FOLDER / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-e", ".[test]", *versions], cwd=ROOT, check=True)
    tests = [python, "-m", "pytest", "-n", "2", "--dist", "worksteal", *sys.argv[1:]]
    return subprocess.run(tests, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
