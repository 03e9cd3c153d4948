"""Training in two real processes (torchrun, gloo): the rows of one, with the base copied or sharded.

One process in place of two is refused.
"""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from conftest import ROOT, examples, tiny_model
from kslottery.training import Engine, Training
from kslottery.tuning import Recipe, embed_tune, full_fine_tune, peft_tune

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from conftest import examples, tiny_model
from test_processes import tune, whole

folder, sharded, kind = sys.argv[2], sys.argv[3] == "sharded", sys.argv[4]
model, whole_model = tiny_model(kind, hidden=32), tiny_model(kind, hidden=32)
if sharded:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
engine = {name: int(value) for name, value in (word.split("=") for word in sys.argv[5:])}
if sys.argv[3] in ("full", "lora"):
    weight = whole(model, sys.argv[3] == "lora")
elif sys.argv[3] == "broken":
    calls = iter(range(8))
    handle = model.register_forward_hook(lambda module, args, output: module.training and next(calls) < 0 or None)
    try:
        tune(model, f"{folder}/run.safetensors", **engine)
        raise AssertionError("it should have been broken off")
    except StopIteration:
        handle.remove()
    weight = tune(model, f"{folder}/run.safetensors", **engine).weight
    assert torch.equal(weight, tune(model).weight)
else:
    rows = tune(model, None if sharded else f"{folder}/run.safetensors", **engine)
    weight = rows.weight
assert dist.get_world_size() == 2 and dist.get_backend() == "gloo"
if sharded:
    halves = [p.to_local().shape[0] == -(-p.shape[0] // 2) for p in model.parameters() if isinstance(p, DTensor)]
    assert all(halves) and len(halves) == len(list(model.parameters()))  # a half here, before and after
    assert not isinstance(weight, DTensor)
    view = rows.matrix(model)  # gathered once, by both
    assert not isinstance(view.base, DTensor) and torch.equal(view[rows.ids], weight)
    assert torch.equal(view[40:], whole_model.get_input_embeddings().weight[40:])  # nothing learned there
save_file({"rows": weight.detach().clone()}, f"{folder}/{dist.get_rank()}.safetensors")
dist.destroy_process_group()
"""


def tune(model, checkpoint=None, **engine):
    "50 examples: the last batch of an epoch holds 2."
    recipe = Recipe(lr_embed=1e-2, epochs_embed=2, batch_size=8, progress=False, engine=Engine(**engine))
    return embed_tune(model, examples(50), recipe, checkpoint=checkpoint)


def whole(model, adapter):
    "What full fine-tuning or LoRA learns, as one vector."
    training = Training(1e-3, 2, 8, progress=False, engine=Engine(accumulate=2))
    if adapter:
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        tuned = peft_tune(model, config, examples(50), training)
    else:
        tuned = full_fine_tune(model, examples(50), training)
    return torch.cat([p.detach().flatten() for p in tuned.parameters() if p.requires_grad])


def two(folder, *words, n=2):
    place = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(n),
            str(script),
            str(ROOT / "tests"),
            str(folder),
            *words,
        ],
        capture_output=True,
        text=True,
        env=place,
    )
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"{rank}.safetensors")["rows"] for rank in range(n)]


@pytest.mark.parametrize(
    "words",
    [
        ("copied", "llama"),
        pytest.param(("copied", "qwen2", "accumulate=2"), marks=pytest.mark.slow),
        ("sharded", "llama"),
        pytest.param(("sharded", "mistral", "accumulate=2"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_two_processes_give_the_rows_of_one(words, tmp_path):
    """No DDP: it would pad a short last batch with repeated examples; and FSDP is torch's own, on the CPU too."""
    base = tiny_model(words[1], hidden=32)
    one, (a, b) = tune(base), two(tmp_path, *words)
    assert torch.equal(a, b) and (a - one.weight).abs().max() < 1e-6
    assert one.delta(base).abs().max() > 1e-2  # which is what there is to compare


@pytest.mark.slow
@pytest.mark.parametrize("what", ["full", "lora"])
def test_two_processes_train_the_baselines(what, tmp_path):
    model = tiny_model("llama", hidden=32)
    one, (a, b) = whole(model, what == "lora"), two(tmp_path, what, "llama")
    assert torch.equal(a, b) and (a - one).abs().max() < 1e-5


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint(tmp_path):
    a, _ = two(tmp_path, "copied", "llama")
    again, _ = two(tmp_path, "copied", "llama")  # finished: read, not trained
    assert torch.equal(a, again)
    with pytest.raises(ValueError, match="another run.*number of processes"):
        tune(tiny_model("llama", hidden=32), tmp_path / "run.safetensors")


@pytest.mark.slow
def test_two_processes_that_were_broken_off_go_on_bit_for_bit(tmp_path):
    "With dropout, so that each process needs its own random numbers again."
    a, b = two(tmp_path, "broken", "gpt2", "save_every=3")
    assert torch.equal(a, b)


@pytest.mark.parametrize("rank", [None, "0"])
def test_one_process_in_place_of_two_is_refused(rank, monkeypatch):
    "A launcher that tells its processes too little: each would train by itself on everything, and nobody would notice."
    model = tiny_model("llama", hidden=32)
    tune(model)  # from now on accelerate knows of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but this training would run in 1 process.*torchrun"):
        tune(model)
