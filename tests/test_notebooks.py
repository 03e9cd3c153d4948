"""Every notebook by papermill, with parameters, at its fast size; the asserts in its cells are the tests."""

import os

import papermill
import pytest

from conftest import ROOT
from test_library import NOTEBOOKS

ELSEWHERE = ("quickstart", "audit")  # test_quickstart and test_audit_worlds run these


@pytest.mark.parametrize("notebook", [n for n in NOTEBOOKS if n.stem not in ELSEWHERE], ids=lambda n: n.stem)
def test_notebook(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("KSLOTTERY_PROGRESS", os.devnull)
    known = papermill.inspect_notebook(str(notebook))
    chosen = {"fast": True, "size": "small", "out": str(tmp_path / "out")}
    papermill.execute_notebook(
        str(notebook),
        str(tmp_path / "done.ipynb"),
        {k: v for k, v in chosen.items() if k in known},
        kernel_name="python3",
        language="python",
        cwd=str(tmp_path),
        progress_bar=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("notebook", [n for n in NOTEBOOKS if n.stem not in ELSEWHERE], ids=lambda n: n.stem)
def test_notebook_at_full_size(notebook, tmp_path):
    papermill.execute_notebook(
        str(notebook),
        str(tmp_path / "done.ipynb"),
        kernel_name="python3",
        language="python",
        cwd=str(tmp_path),
        progress_bar=False,
    )


def test_a_broken_assertion_fails(tmp_path):
    text = (ROOT / "nbs" / "02_ks.ipynb").read_text()
    broken = text.replace(".tolist() == [0.5]", ".tolist() == [0.25]")
    assert broken != text
    (tmp_path / "broken.ipynb").write_text(broken)
    with pytest.raises(papermill.PapermillExecutionError, match="AssertionError"):
        papermill.execute_notebook(
            str(tmp_path / "broken.ipynb"), str(tmp_path / "done.ipynb"), kernel_name="python3", progress_bar=False
        )
