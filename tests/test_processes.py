"""Row tuning in two real processes (torchrun, gloo): the same rows as one process gives, with the base copied or sharded; one process in place of two is refused."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, examples, tiny_model
from kslottery.tuning import embed_tune

SETTINGS = dict(lr=1e-2, epochs=2, batch_size=8, progress=False)  # 50 examples: the last batch of an epoch holds 2

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from conftest import examples, tiny_model
from test_processes import SETTINGS, tune

folder, sharded, kind = sys.argv[2], sys.argv[3] == "sharded", sys.argv[4]
model = tiny_model(kind, hidden=32)
if sharded:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
more = {name: int(value) for name, value in (word.split("=") for word in sys.argv[5:])}
rows = tune(model, **more, **({} if sharded else {"checkpoint": f"{folder}/run.safetensors"}))
assert dist.get_world_size() == 2 and dist.get_backend() == "gloo"
if sharded:
    assert all(isinstance(p, DTensor) and p.to_local().shape[0] == -(-p.shape[0] // 2) for p in model.parameters())  # a half here, before and after
    assert not isinstance(rows.rows, DTensor)
save_file({"rows": rows.rows.detach().clone()}, f"{folder}/{dist.get_rank()}.safetensors")
dist.destroy_process_group()
"""


def tune(model, **more):
    return embed_tune(model, examples(50), **SETTINGS, **more)


def two(folder, *words, n=2):
    place = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(script), str(ROOT / "tests"), str(folder), *words],
                          capture_output=True, text=True, env=place)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"{rank}.safetensors")["rows"] for rank in range(n)]


@pytest.mark.parametrize(
    "words",
    [
        ("copied", "llama"),
        pytest.param(("copied", "qwen2", "gradient_accumulation_steps=2"), marks=pytest.mark.slow),
        ("sharded", "llama"),
        pytest.param(("sharded", "mistral", "gradient_accumulation_steps=2"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_two_processes_give_the_rows_of_one(words, tmp_path):
    "PyTorch's DDP would pad a short last batch with repeated examples, and the Trainer would turn a CPU's FSDP into DDP: neither is used here."
    base = tiny_model(words[1], hidden=32)
    one, (a, b) = tune(base), two(tmp_path, *words)
    assert torch.equal(a, b) and (a - one.rows).abs().max() < 1e-6
    assert one.delta(base).abs().max() > 1e-2  # which is what there is to compare


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint(tmp_path):
    a, _ = two(tmp_path, "copied", "llama")
    again, _ = two(tmp_path, "copied", "llama")  # finished: read, not trained
    assert torch.equal(a, again)
    with pytest.raises(ValueError, match="another run.*number of processes"):
        tune(tiny_model("llama", hidden=32), checkpoint=tmp_path / "run.safetensors")


def test_one_process_in_place_of_two_is_refused(monkeypatch):
    "torchrun on a machine without a GPU, told not to use the CPU: each process would train by itself on everything, and nobody would notice."
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but this training would run in 1 process.*torchrun"):
        tune(tiny_model("llama", hidden=32), use_cpu=False)
