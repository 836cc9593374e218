"""The oldest versions that pyproject.toml admits, and the workflow that runs with them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def oldest(*words):
    done = subprocess.run([sys.executable, ROOT / ".ci" / "oldest.py", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split("==") for line in done.stdout.splitlines())


def test_every_package_has_an_oldest_version():
    pins = oldest()
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert names < set(pins)
    assert {"deepspeed", "accelerate", "peft", "lm-eval", "gguf", "wandb"} == set(pins) - names
    assert f"torch>={pins['torch']}" in PROJECT["dependencies"]
    assert oldest("torch==2.13.0") == {**pins, "torch": "2.13.0"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_only_read_and_run_actions_of_known_content(path):
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in workflow["jobs"].values())
    uses = re.findall(r"uses: (\S+)", text)
    assert uses
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in uses)
    scripts = set(re.findall(r"\.ci/[\w.]+", text))
    assert scripts
    assert all((ROOT / script).stat().st_mode & 0o100 for script in scripts if "." not in script[4:])
    assert all((ROOT / script).exists() for script in scripts)


def test_the_workflow_runs_what_a_machine_runs_and_oldest_and_newest_versions():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert any(step.get("run") == ".ci/run" for step in jobs["test"]["steps"])
    assert jobs["versions"]["strategy"]["matrix"]["versions"] == ["oldest", "newest"]
    assert any(step.get("run") == ".ci/versions ${{ matrix.versions }}" for step in jobs["versions"]["steps"])


def test_the_workflow_runs_slow_tests_and_those_of_several_processes_with_the_newest_extras():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["extras"]
    (step,) = [step for step in job["steps"] if step.get("run") == ".ci/versions newest"]
    extras = set(step["env"]["EXTRAS"].strip("[]").split(","))
    assert {"deepspeed", "gguf", "lora", "wandb"} <= extras <= set(PROJECT["optional-dependencies"])
    assert step["env"]["MARKS"] == "(slow or distributed) and not network"
    script = (ROOT / ".ci" / "versions").read_text(encoding="utf-8")
    read = set(re.findall(r"\$\{([A-Z_]+):[-+?]", script))
    assert set(step["env"]) <= read
    assert all((ROOT / folder).is_dir() for folder in step["env"]["TESTS"].split())
