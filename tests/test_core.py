"""Files that appear whole, bars that a person sees, and where a model came from."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShiraConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from conftest import TOY, tiny_model
from kslottery.core import (
    bar_label,
    find_device,
    load_adapter,
    load_config,
    load_model,
    progress_bar,
    read_json,
    readable_file,
    settle,
    source_of,
    whole_file,
    whole_files,
    whole_folder,
    write_json,
)


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


# Adapters

CAUSAL = dict(task_type="CAUSAL_LM")
ADAPTERS = {
    "lora": lambda: LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **CAUSAL),
    "query": lambda: LoraConfig(r=2, target_modules=["q_proj", "c_attn"], init_lora_weights=False, **CAUSAL),
    "no task": lambda: LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    "head": lambda: LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"], **CAUSAL),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "tokens": lambda: TrainableTokensConfig(token_indices=[5, 6], init_weights=False, **CAUSAL),
    "shira": lambda: ShiraConfig(r=2, init_weights=False, **CAUSAL),
}


@pytest.fixture
def adapter(tmp_path):
    "An adapter for a model, saved, with numbers that are none of its defaults: (folder, the model that has it)."

    def make(name, model):
        adapted = get_peft_model(copy.deepcopy(model), ADAPTERS[name]()).eval()
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p += 0.3 * torch.randn_like(p)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", adapted

    return make


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_comes_back_as_it_was_saved(adapter, kind, name):
    if (kind, name) == ("gpt2", "shira"):
        pytest.skip("PEFT has no SHiRA for GPT-2's layers")
    model, x = tiny_model(kind).to(torch.bfloat16 if kind == "qwen2" else torch.float32), torch.arange(5, 12)[None]
    before = model(x).logits
    folder, adapted = adapter(name, model)
    got = load_adapter(model, folder)
    assert not got.training and not any(p.requires_grad for p in got.parameters())
    assert torch.equal(got(x).logits, adapted(x).logits) and not torch.equal(got(x).logits[:, -7:], before)


def resized(model):
    model.resize_token_embeddings(72)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name, other, words",
    [
        ("lora", lambda: tiny_model("llama", hidden=32), "does not fit this model .*size mismatch"),
        ("lora", lambda: tiny_model("gpt2"), "does not fit this model .Target modules"),
        ("query", lambda: deeper("llama"), "lacks 4 tensors, and 0 find no place"),
        ("prefix", lambda: tiny_model("llama", hidden=32), "does not fit this model .*size mismatch"),
        ("prefix", lambda: deeper("llama"), "does not fit this model .*size mismatch"),
        ("tokens", lambda: tiny_model("llama", vocabulary=6), "does not fit this model"),
        ("head", lambda: resized(tiny_model("llama")), "does not fit this model .*resized alike"),
    ],
)
def test_an_adapter_for_another_base_is_refused(adapter, name, other, words):
    folder, _ = adapter(name, tiny_model("llama"))
    model = other()
    before, said = [*model.named_modules()], model(torch.arange(5)[None]).logits
    with pytest.raises(ValueError, match=words) as caught:
        load_adapter(model, folder)
    assert "\n" not in str(caught.value) and "tuned on" in str(caught.value) and "copy" in str(caught.value)
    assert [*model.named_modules()] == before and not hasattr(model, "peft_config")  # nothing is left in it
    assert torch.equal(model(torch.arange(5)[None]).logits, said)


def deeper(kind):
    config = tiny_model(kind).config
    config.num_hidden_layers, config.layer_types = 3, None
    return type(tiny_model(kind))(config)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_adapter_for_more_layers_is_refused(adapter):
    "PEFT leaves out what finds no place, and says nothing."
    with pytest.raises(ValueError, match="lacks 0 tensors, and 28 find no place"):
        load_adapter(tiny_model("llama"), adapter("lora", deeper("llama"))[0])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"peft_type": "HYPER_LORA"}, "kind 'HYPER_LORA', which this PEFT does not know"),
        ({"peft_type": ["LORA"]}, "does not know"),
        ({"peft_type": "XLORA"}, "names more to load"),
        ({"megatron_config": {"a": 1}}, "names more to load"),
        ({"task_type": "SEQ_CLS"}, "was tuned for SEQ_CLS"),
        ({"r": "many"}, "does not fit|damaged"),
        ("[]", "is damaged"),
        (None, "holds no adapter_config.json"),
        ("bin", "adapter_model.bin is a pickle, which is not opened"),
        ("cut", "is damaged"),
    ],
)
def test_an_odd_adapter_gets_one_sentence(adapter, change, words):
    folder, _ = adapter("lora", tiny_model("llama"))
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if isinstance(change, dict):
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    elif change == "[]":
        config.write_text(change)
    elif change is None:
        config.unlink()
    elif change == "bin":
        weights.rename(folder / "adapter_model.bin")
    else:
        weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        load_adapter(tiny_model("llama"), folder)
    assert "\n" not in str(caught.value)


# What is hostile: other writers, kills, links, full disks


def hidden_in(folder):
    return [path.name for path in folder.rglob(".*")]


def dies_in(writer):
    "In a fork that `kill -9` ends where the block would."
    if (child := os.fork()) == 0:
        with writer as place:
            for name in "ab":
                (place / name if place.is_dir() else place).write_text("new")
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)


def test_what_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(FileExistsError, match="meanwhile") as caught, whole_folder(tmp_path / "t", bool) as work:
        (work / "mine").touch()
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "theirs").touch()
    assert os.listdir(tmp_path / "t") == ["theirs"] and not hidden_in(tmp_path) and "Errno" not in str(caught.value)


def test_of_two_that_replace_one_folder_the_later_is_refused(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "old").touch()
    with pytest.raises(FileExistsError, match="meanwhile"), whole_folder(tmp_path / "t", bool) as slow:
        (slow / "slow").touch()
        with whole_folder(tmp_path / "t", bool) as fast:
            (fast / "fast").touch()
    assert os.listdir(tmp_path / "t") == ["fast"] and not hidden_in(tmp_path)


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    with whole_file(tmp_path / "f") as one, whole_file(tmp_path / "f") as two:
        one.write_text("one")
        two.write_text("two")
    assert one != two and (tmp_path / "f").read_text() == "one" and not hidden_in(tmp_path)


def test_links_stay_links_and_planted_ones_are_not_followed(tmp_path):
    (tmp_path / "true").mkdir()
    (tmp_path / "link").symlink_to("true")
    (tmp_path / "secret").write_text("kept")
    (tmp_path / ".f.part").symlink_to("secret")
    (tmp_path / "f").symlink_to("true/f")
    with whole_folder(tmp_path / "link", bool) as work:
        (work / "a").touch()
    write_json(tmp_path / "f", [])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "f").is_symlink()
    assert sorted(os.listdir(tmp_path / "true")) == ["a", "f"] and (tmp_path / "secret").read_text() == "kept"


def test_the_next_use_tidies_up_after_a_kill(tmp_path):
    (tmp_path / "t").mkdir()
    for writer in (whole_folder(tmp_path / "t", bool), whole_file(tmp_path / "f"), whole_files(tmp_path / "t")):
        dies_in(writer)
    assert len(hidden_in(tmp_path)) == 3 and os.listdir(tmp_path / "t")[0].endswith(".kslottery")
    settle(tmp_path / "t")
    write_json(tmp_path / "f", [])
    assert hidden_in(tmp_path) == [] == os.listdir(tmp_path / "t")


@pytest.mark.parametrize(
    "writer, rename, found",
    [  # before the second of two renames: of the folder, or of the files of a change
        (lambda folder: whole_folder(folder, bool), "rename", {"a": "old", "b": "old"}),
        (whole_files, "replace", {"a": "new", "b": "new"}),
    ],
)
def test_what_a_kill_left_half_done_is_undone_or_carried_through(tmp_path, writer, rename, found):
    folder, real, left = tmp_path / "t", getattr(os, rename), [2]
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text("old")

    def step(*names):
        left[0] -= 1
        return real(*names) if left[0] else os.kill(os.getpid(), 9)

    if (child := os.fork()) == 0:
        with writer(folder) as work:
            for name in "ab":
                (work / name).write_text("new")
            setattr(os, rename, step)
    os.waitpid(child, 0)
    assert hidden_in(tmp_path) and {p.name: p.read_text() for p in folder.glob("?")} != found
    settle(folder)
    assert not hidden_in(tmp_path) and {p.name: p.read_text() for p in folder.iterdir()} == found


def test_a_living_writer_is_not_tidied_up(tmp_path):
    with whole_file(tmp_path / "f") as part:
        part.write_text("whole")
        settle(tmp_path / "f")
    assert (tmp_path / "f").read_text() == "whole"


@pytest.mark.parametrize("name", ["", ".", "..", "x/.."])
def test_the_place_itself_is_not_replaced(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="name a folder in it"), whole_folder(name, bool):
        pass


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [FULL, RuntimeError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk_is_said_with_path_and_need(tmp_path, error):
    for writer in (whole_file(tmp_path / "out"), whole_folder(tmp_path / "out", bool), whole_files(tmp_path)):
        with pytest.raises(OSError, match=f"^{tmp_path}.* needs more than [0-9.,]+ MB, .* full .*free some"), writer:
            raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bad", ["x" * 300, "file/under", "\0", "\ud800", "~nobody-of-this-name/x", "missing"])
def test_a_path_that_cannot_be_read_gets_one_sentence(tmp_path, monkeypatch, bad):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(FileNotFoundError, match="check how it is written|write the path out") as caught:
        readable_file(bad)
    assert str(caught.value).isprintable() and "Errno" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="is a (folder|pipe or a device): name a file"):
            read_json(path, dict)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"[]", b"{}", b"null", b'{"a": ' * 5000, b"", b"\xff\xfe"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, name, content):
    tiny_model("llama").save_pretrained(tmp_path)
    TOY.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    try:
        load_model(tmp_path, device="cpu")
    except (ValueError, FileNotFoundError) as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error) and len(str(error)) < 800


def test_a_model_is_not_completed_by_random_numbers(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    TOY.save_pretrained(tmp_path)
    weights = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "mlp.up_proj" not in n}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of its tensors .*up_proj"):
        load_model(tmp_path, device="cpu")


def test_code_of_a_checkpoint_is_named_not_run(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path)
    TOY.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    with pytest.raises(ValueError, match="Python code of its own, which is never run"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="Python code of its own, which is never run"):
        load_config(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_model_of_too_many_layers_is_not_begun(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    TOY.save_pretrained(tmp_path)
    about = tmp_path / "config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "num_hidden_layers": 2**70}))
    with pytest.raises(ValueError, match=f"asks for {2**70} layers"):
        load_model(tmp_path)


def test_a_pipe_in_a_checkpoint_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    os.mkfifo(tmp_path / "tokenizer.json")
    for load in (load_config, load_model):
        with pytest.raises(ValueError, match="tokenizer.json is a pipe"):
            load(tmp_path)


@pytest.mark.parametrize("name", ["cuda:99", "x", "", "cpu:x", "meta", "hpu"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(ValueError, match="choose auto, cpu"):
        find_device(name)


def test_folders_above_go_with_what_was_not_made(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "a" / "b" / "c", bool):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with whole_folder(tmp_path / "a" / "b" / "c", bool):
        pass
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_who_is_refused_has_tidied_up(tmp_path):
    (tmp_path / "t").mkdir()
    dies_in(whole_folder(tmp_path / "t", bool))
    (tmp_path / "t" / "theirs").touch()
    with pytest.raises(FileExistsError, match="something else"), whole_folder(tmp_path / "t", lambda path: False):
        pass
    assert not hidden_in(tmp_path)


@pytest.mark.parametrize("name", ["was", "done", "work"])
def test_a_file_may_be_called_as_the_parts_of_a_room_are(tmp_path, name):
    "Half a file called `was` would be taken for an old folder that lay aside."
    dies_in(whole_file(tmp_path / name))
    settle(tmp_path / name)
    assert os.listdir(tmp_path) == []
    write_json(tmp_path / name, [])
    assert os.listdir(tmp_path) == [name]
