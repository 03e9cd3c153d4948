"""CITATION.cff: valid where it matters, and in step with settings.ini."""

import re
from configparser import ConfigParser

import yaml

from conftest import ROOT
from readme import badges


def test_citation():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    package, cited = settings["DEFAULT"], yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (
        cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["message"]
    )  # with title and authors, all that the format requires
    assert (cited["title"], cited["version"], cited["repository-code"]) == (
        package["title"],
        package["version"],
        package["git_url"],
    )
    assert cited["authors"] == [{"name": "The kslottery authors"}] and package["author"] == "The kslottery authors"
    assert (
        cited["license"] == "Apache-2.0"
        and "Apache License" in (ROOT / "LICENSE").read_text()
        and cited["abstract"].startswith(package["description"])
    )
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= paper.keys() and [a["family-names"] for a in paper["authors"]] == [
        "Yuan",
        "Ma",
        "Yuan",
        "Sun",
        "Li",
    ]
    assert paper["year"] == 2025 and paper["doi"] == "10.18653/v1/2025.naacl-long.458"
    readme = re.sub(r"\n>? ?", " ", (ROOT / "README.md").read_text())
    assert paper["title"] in readme and paper["doi"] in readme


def test_badges_say_what_the_settings_say():
    assert (
        badges() in (ROOT / "README.md").read_text()
        and f"version-{yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version']}-" in badges()
    )
