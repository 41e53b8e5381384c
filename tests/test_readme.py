"""What the README shows must run."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metarec_gym.recommenders import registry
from metarec_gym.recommenders.completions import ENDPOINT_VARIABLE
from tests.local_endpoint import Server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULE_OF_EXTRA = {"recommenders": "cornac", "llm": "openai"}


def blocks() -> list[Any]:
    """The Python blocks; one that begins with `# needs: pip install 'metarec-gym[EXTRA]'` is skipped without that extra."""
    found = []
    for block in re.finditer(r"```python\n(.*?)```", README, re.DOTALL):
        line = README.count("\n", 0, block.start()) + 2
        extra = re.match(r"# needs: pip install 'metarec-gym\[(\w+)\]'", block[1])
        missing = extra is not None and importlib.util.find_spec(MODULE_OF_EXTRA[extra[1]]) is None
        skip = pytest.mark.skipif(missing, reason=f"needs the extra {extra[1]!r}" if extra else "")
        # as many empty lines before it as in the README, so that errors name its lines
        found.append(pytest.param("\n" * (line - 1) + block[1], id=f"line_{line}", marks=skip))
    return found


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a reader has who types the blocks one after the other: one namespace, one folder, a local language model."""
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        patch.setenv(ENDPOINT_VARIABLE, server.url)
        patch.setattr(registry, "_TRUSTED", {})
        yield {"__name__": "readme"}
    server.close()


@pytest.mark.parametrize("code", blocks())
def test_a_python_block_of_the_readme_runs(code: str, session: dict[str, Any]) -> None:
    exec(compile(code, "README.md", "exec"), session)


def test_the_ten_lines_of_python_say_what_they_played(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks()[0].values[0], "README.md", "exec"), {})
    assert "specialist_0" in capsys.readouterr().out


def test_every_module_that_the_readme_runs_exists() -> None:
    modules = set(re.findall(r"python -m ([a-z_0-9.]+)", README))
    assert {"experiments.build_world", "experiments.compare", "envs_data.own_log.prepare"} <= modules
    for module in modules:
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
