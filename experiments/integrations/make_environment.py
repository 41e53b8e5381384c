"""Makes the environment of a library that cannot be installed beside ours, as pinned in `requirements-<library>.txt`.

    python -m experiments.integrations.make_environment rllib

It lies in `build/envs/<library>`, holds this checkout of `metarec_gym` in editable form, and is left alone when it is up to date.
Nothing beyond Python's standard library is needed to make it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARIES = ("rllib", "tianshou")


def python_of(library: str, root: Path = ROOT) -> Path:
    """Where the environment's interpreter lies, whether it has been made or not."""
    scripts = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return root.joinpath("build", "envs", library, *scripts)


def fingerprint(library: str) -> str:
    """SHA-256 of everything that decides what is installed."""
    requirements = (HERE / f"requirements-{library}.txt").read_bytes()
    return hashlib.sha256(requirements + (ROOT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()


def is_ready(library: str) -> bool:
    """Whether the environment is complete and made of the present requirements."""
    stamp = ROOT / "build" / "envs" / library / "made_of.txt"
    return stamp.is_file() and stamp.read_text() == fingerprint(library)


def make(library: str) -> Path:
    """Makes the environment unless it is ready; returns its interpreter.

    Raises:
        subprocess.CalledProcessError: When pip cannot install the pins; the folder then has no stamp and is made anew next time.
    """
    python = python_of(library)
    if is_ready(library):
        return python
    folder = ROOT / "build" / "envs" / library
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    requirements = HERE / f"requirements-{library}.txt"
    subprocess.run([*pip, "install", "-r", str(requirements), "-e", str(ROOT)], check=True)
    subprocess.run([*pip, "check"], check=True)
    # written last: a folder whose making was cut short is not taken for a whole one
    (folder / "made_of.txt").write_text(fingerprint(library))
    return python


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Makes build/envs/<library> from its pinned requirements.")
    parser.add_argument("library", choices=LIBRARIES)
    library = parser.parse_args().library
    print(f"{make(library)} is ready")


if __name__ == "__main__":
    main()
