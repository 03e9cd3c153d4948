"""Files that appear whole, bars that a person sees, and where a model came from."""

import os

import pytest
import torch

from conftest import TOY, tiny_model
from kslottery.core import bar_label, load_model, progress_bar, source_of, whole_file, whole_folder, write_json


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_can_be_read_by_those_whom_the_umask_lets(tmp_path, umask, mode):
    """safetensors writes files that only their owner may read: colleagues could not open a ticket."""
    was = os.umask(umask)
    try:
        with whole_file(tmp_path / "rows") as part:
            part.touch(mode=0o600)
        with whole_folder(tmp_path / "ticket", is_own=lambda path: True) as work:
            (work / "inner").mkdir(mode=0o700)
            (work / "inner" / "rows").touch(mode=0o600)
        write_json(tmp_path / "facts", {})
    finally:
        os.umask(was)
    for name in ("rows", "facts", "ticket/inner/rows"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode, name
    for name in ("ticket", "ticket/inner"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o777 & ~umask, name


def test_a_bar_is_shown_where_it_was_asked_for(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("KSLOTTERY_PROGRESS", str(tmp_path / "bars"))
    for progress in (True, "Seed 1", False, ""):
        with progress_bar(3, *bar_label(progress, "Scanning")) as bar:
            for _ in range(3):
                bar.update(1)
    written = (tmp_path / "bars").read_text()
    assert "Scanning" in written and "Seed 1" in written and written.count("3/3") <= 2
    assert capfd.readouterr().err == ""


def test_a_model_has_a_source(tmp_path):
    model = tiny_model("llama")
    assert source_of(model) == ("", None)
    model.save_pretrained(tmp_path / "model")
    TOY.save_pretrained(tmp_path / "model")
    loaded, tokenizer = load_model(tmp_path / "model", device="cpu")
    assert source_of(loaded) == (str(tmp_path / "model"), None) and not loaded.training
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert source_of(type(model).from_pretrained(tmp_path / "model")) == (str(tmp_path / "model"), None)


@pytest.mark.parametrize(
    "missing, words",
    [("config.json", "no config.json"), ("model.safetensors", "no safetensors"), ("tokenizer", "no tokenizer")],
)
def test_a_folder_that_is_no_checkpoint_gets_one_sentence(tmp_path, missing, words):
    tiny_model("llama").save_pretrained(tmp_path)
    TOY.save_pretrained(tmp_path)
    for path in tmp_path.glob(f"{missing}*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=words) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
