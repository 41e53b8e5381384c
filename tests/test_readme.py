"""What the README shows must run."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_ten_lines_of_python_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "specialist_0" in capsys.readouterr().out


def test_every_module_that_the_readme_runs_exists():
    modules = set(re.findall(r"python -m ([a-z_0-9.]+)", README))
    assert {"experiments.build_world", "experiments.compare", "envs_data.own_log.prepare"} <= modules
    root = Path(__file__).parent.parent
    for module in modules:
        assert (root / (module.replace(".", "/") + ".py")).is_file(), module
