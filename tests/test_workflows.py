"""What GitHub and pre-commit run: every command in their files is one that exists here."""

import re
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from conftest import ROOT

WORKFLOWS = {p.stem: yaml.safe_load(p.read_text()) for p in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
MAKE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKE, re.M))
ACTIONS = {  # what a workflow may use, by its major version; only these and make
    *("actions/checkout@v6", "actions/setup-python@v6", "actions/upload-pages-artifact@v4", "actions/deploy-pages@v4"),
    "quarto-dev/quarto-actions/setup@v2",
}
RUNNER = {"gh", "test"}  # commands that a runner of GitHub has


def steps():
    for name, workflow in WORKFLOWS.items():
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                yield name, step


def settings():
    found = ConfigParser(delimiters=["="])
    found.read(ROOT / "settings.ini", encoding="utf-8")
    return found["DEFAULT"]


def test_there_are_three_workflows():
    assert WORKFLOWS.keys() == {"test", "docs", "release"}
    for workflow in WORKFLOWS.values():
        assert workflow.keys() == {"name", True, "permissions", "jobs"} | ({"concurrency"} & workflow.keys())
        assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_every_command_exists():
    for name, step in steps():
        assert ("run" in step) != ("uses" in step), step
        for line in step.get("run", "").strip().splitlines():
            command, *words = shlex.split(line, comments=True)
            if command == "make":
                assert words and {w for w in words if "=" not in w} <= TARGETS, f"{name}: {line}"
            else:
                assert command in RUNNER, f"{name}: {line}: call a make target, so that it can be tried here"
        if "uses" in step:
            assert step["uses"] in ACTIONS, f"{name}: {step['uses']}"


def test_all_actions_are_used():
    assert {step["uses"] for _, step in steps() if "uses" in step} == ACTIONS


def test_no_secret_but_the_token_of_the_run():
    for path in (ROOT / ".github").rglob("*.yml"):
        assert set(re.findall(r"secrets\.(\w+)", path.read_text())) <= {"GITHUB_TOKEN"}
    writes = {
        (name, *right)
        for name, workflow in WORKFLOWS.items()
        for part in (workflow, *workflow["jobs"].values())
        for right in part.get("permissions", {}).items()
        if right[1] != "read"
    }
    assert writes == {("release", "contents", "write"), ("docs", "pages", "write"), ("docs", "id-token", "write")}


def test_nothing_is_uploaded_elsewhere():
    text = "\n".join(p.read_text() for p in (ROOT / ".github").rglob("*.yml")) + MAKE
    assert not re.search(r"twine|pypi-publish|upload\.pypi|codecov|docker push", text)
    assert WORKFLOWS["release"][True] == {"push": {"tags": ["v*"]}}


def test_pythons_are_those_of_the_settings():
    "The first is min_python; README, setup.py and the Makefile name the same ones."
    (job,) = WORKFLOWS["test"]["jobs"].values()
    pythons = job["strategy"]["matrix"]["python"]
    assert pythons[0] == settings()["min_python"] and pythons == ["3.11", "3.12", "3.13"]
    named = {f"{v}" for v in re.findall(r"Programming Language :: Python :: (3\.\d+)", (ROOT / "setup.py").read_text())}
    assert named == set(pythons)
    assert re.search(r"for p in (.+?);", MAKE)[1].split() == [f"python{p}" for p in pythons] + ["python3"]
    assert f"Python {pythons[0]} to {pythons[-1]}" in (ROOT / "README.md").read_text()


def test_the_makefile_has_every_target_that_it_names():
    phony = set(re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", MAKE, re.M)[1].replace("\\\n", " ").split())
    assert phony == TARGETS
    steps = re.search(r"for step in ([\w ]+); do \$\(BIN\)/python tests/\$\$step.py", MAKE)[1].split()
    for script in re.findall(r"\$\(BIN\)/python ([\w/]+\.py)", MAKE) + [f"tests/{step}.py" for step in steps]:
        assert (ROOT / script).is_file(), script


def test_every_tool_is_pinned():
    "What make and the hooks call out of .venv comes from a requirement with an exact version in constraints.txt."
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pins = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    named = " ".join(value for key, value in settings().items() if key.endswith("requirements")).split()
    wanted = {re.sub(r"[-_.]+", "-", re.split(r"[<>=!\[]", name)[0]).lower() for name in named}
    assert wanted - pins == set()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for repo in hooks for hook in repo["hooks"]]
    tools = re.findall(r"(?:\$\(BIN\)|\.venv/bin)/([\w-]+)", "\n".join([MAKE, *entries]))
    owners = {"nbdev_clean": "nbdev", "nbdev_export": "nbdev", "python": None, "kslottery": None, "activate": None}
    for tool in {*tools, *re.findall(r"python -m (\w+)", MAKE)} - {"pip", "venv", "http"}:
        owner = owners.get(tool, tool)
        assert owner is None or owner in wanted, f"{tool} is no requirement of settings.ini"


def test_hooks_are_local_and_their_commands_are_here():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    for hook in repos[0]["hooks"]:
        command, *words = hook["entry"].split()
        assert hook["language"] == "system" and (Path(sys.executable).parent / Path(command).name).is_file(), command
        assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_issue_templates_are_forms(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert all({"name", "url", "about"} == link.keys() for link in form["contact_links"])
    else:
        assert {"name", "description", "body"} <= form.keys() and all("id" in field for field in form["body"])


def test_the_version_is_one():
    version = settings()["version"]
    assert f'__version__ = "{version}"' in (ROOT / "kslottery" / "__init__.py").read_text()
    assert f"## {version} (" in (ROOT / "CHANGELOG.md").read_text()
