"""The package, as settings.ini describes it; a built one carries the tutorials."""

import json
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
EXTRAS = ("run", "docs", "spbleu", "llama", "harness")
run, docs, spbleu, llama, harness = (cfg[f"{name}_requirements"].split() for name in EXTRAS)
readme = here / "README.md"


class BuildWithTutorials(build_py):
    """Put the tutorials, without outputs, and the files that they read beside the modules: there is no clone there."""

    def run(self):
        super().run()
        for source, target in self.tutorials() if not self.editable_mode else ():
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix != ".ipynb":
                shutil.copyfile(source, target)
                continue
            notebook = json.loads(source.read_text(encoding="utf-8"))
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    cell.update(outputs=[], execution_count=None)
            target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def tutorials(self):
        place = Path(self.build_lib, "kslottery", "notebooks")
        for source in sorted((here / "nbs" / "tutorials").glob("*.*")):
            if source.suffix in (".ipynb", ".yaml"):
                yield source, place / source.name
        for name in ("audit_worlds", "stability"):  # what "Claims and checks" reads
            yield here / "benchmarks" / "results" / f"{name}.json", place / "results" / f"{name}.json"

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + [str(target) for _, target in self.tutorials()]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    packages=find_packages(include=["kslottery", "kslottery.*"]),
    package_data={"kslottery": ["*.json", "*.j2", "*.pyi", "py.typed"]},
    cmdclass={"build_py": BuildWithTutorials},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={
        "run": run,
        "docs": docs,
        "spbleu": spbleu,
        "llama": llama,
        "harness": harness,
        "dev": run + docs + spbleu + cfg["dev_requirements"].split(),
    },
    entry_points={"console_scripts": ["kslottery=kslottery.cli:main"], "nbdev": ["kslottery=kslottery._modidx:d"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
