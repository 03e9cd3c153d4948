from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
run, docs, spbleu = (cfg[f"{name}_requirements"].split() for name in ("run", "docs", "spbleu"))
readme = here / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    packages=find_packages(include=["kslottery", "kslottery.*"]),
    package_data={"kslottery": ["*.json", "*.j2"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={
        "run": run,
        "docs": docs,
        "spbleu": spbleu,
        "dev": run + docs + spbleu + cfg["dev_requirements"].split(),
    },
    entry_points={"console_scripts": ["kslottery=kslottery.cli:main"], "nbdev": ["kslottery=kslottery._modidx:d"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
