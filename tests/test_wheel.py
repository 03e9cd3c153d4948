"""What `pip install` brings: the wheel is built, installed into an empty folder and used where there is no clone."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from conftest import ROOT

TUTORIALS = ROOT / "nbs" / "tutorials"
OURS = ("KSLOTTERY_TEST_FORKS", "KSLOTTERY_PROGRESS", "JUPYTER_PATH", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")


def run(*words, cwd, **more):
    "A program, without what the tests put into the environment."
    place = {name: value for name, value in os.environ.items() if name not in OURS} | more
    return subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, env=place)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The folder of the wheel and the sdist, built from a copy of the sources."
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs")
    for name in ("kslottery", "nbs/tutorials", "benchmarks/results"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignored)
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=sources)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = [line for line in (done.stdout + done.stderr).splitlines() if re.search("warn|deprecat", line, re.I)]
    assert told == [] and sorted(p.suffix for p in out.iterdir()) == [".gz", ".whl"]
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "The folder that the wheel is installed in, and a function that runs its command, or Python, elsewhere."
    target, elsewhere = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("elsewhere")
    (wheel,) = built.glob("*.whl")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    done = run(sys.executable, *pip, "--target", target, wheel, cwd=elsewhere)
    assert done.returncode == 0, done.stderr

    def use(*words):
        done = run(sys.executable, *words, cwd=elsewhere, PYTHONPATH=str(target))
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return target, use


def test_the_wheel_holds_all_that_a_command_reads(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {n.removeprefix("kslottery/") for n in wheel.namelist() if n.startswith("kslottery/")}
        assert names >= {"report.html.j2", "results.schema.json", "py.typed", "__init__.pyi", "cli.py"}
        carried = [p for p in TUTORIALS.iterdir() if p.suffix in (".ipynb", ".yaml")]
        assert len(carried) >= 10 and names >= {f"notebooks/{p.name}" for p in carried}
        for name in (n for n in names if n.endswith(".ipynb")):
            cells = json.loads(wheel.read(f"kslottery/{name}"))["cells"]
            assert not any(c.get("outputs") or c.get("execution_count") for c in cells), name
        about = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in about and "License-File: LICENSE" in about


def test_it_is_the_installed_package_that_is_used(installed):
    target, use = installed
    code = (
        "import kslottery\nfrom kslottery.run import find_notebook\n"
        "print(kslottery.__file__, find_notebook('quickstart'), find_notebook('reproduce-7b', '.yaml'))"
    )
    assert [str(target)] * 3 == [word[: len(str(target))] for word in use("-c", code).split()]


def test_the_quickstart_of_an_installed_package(installed, tmp_path):
    target, use = installed
    command = (target / "bin" / "kslottery", "run", "quickstart")
    short = "fast=true test_limit=8 epochs=1 top_k=2".split()
    options = [word for value in (*short, f"out={tmp_path / 'run'}") for word in ("-p", value)]
    said = json.loads(use(*command, *options, "--json"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert said["results"] and "kslottery run quickstart -p " in page and "fast=True" in page and "/babel.html" in page
    code = f"from kslottery import Ticket; print(len(Ticket.load({str(tmp_path / 'run' / 'ticket')!r}).ids))"
    assert int(use("-c", code)) == 2


def test_the_doctor_of_an_installed_package(installed):
    target, use = installed
    found = json.loads(use(target / "bin" / "kslottery", "doctor", "--json"))
    assert found["ok"] and found["uses"]["kslottery run"]["ok"] and len(found["packages"]) > 10


@pytest.mark.slow
def test_the_block_of_the_readme(installed):
    _, use = installed
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    code = "\n".join(blocks)
    assert "find_ticket(" in code
    assert use("-c", re.sub('size = "default"', 'size = "small"', code)).count("first line") == 2
