"""A row tuning that is killed goes on from its checkpoint, bit for bit; what is not its own whole one is refused."""

import os
import random
import signal
import subprocess
import time

import pytest
import torch
from safetensors import safe_open

import forks
from conftest import ROOT, examples, tiny_model
from kslottery import training
from kslottery.training import Engine, Training, train
from kslottery.tuning import Recipe, partial_tune


def recipe(lr=1e-2, epochs=4, seed=0, **engine):
    return Recipe(
        lr_partial=lr, epochs_partial=epochs, batch_size=8, seed=seed, progress=False, engine=Engine(**engine)
    )


def tune(checkpoint=None, n=70, kind="gpt2", **more):
    "gpt2 has dropout: the random numbers must go on too."
    return partial_tune(tiny_model(kind), [7, 12, 30], examples(n), recipe(**more), checkpoint=checkpoint).weight


class Stop(Exception):
    pass


def interrupted(checkpoint, after, monkeypatch, error=Stop, **more):
    "A run that is broken off in the middle of step `after` + 1."
    calls, real = [], training._Learner.forward

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise error()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(training._Learner, "forward", forward)
    with pytest.raises(error):
        tune(checkpoint, **more)
    monkeypatch.undo()


@pytest.mark.parametrize("after", [1, 8, 9, 10, 26, 35])  # an epoch has 9 steps
def test_an_interrupted_run_goes_on_bit_for_bit(after, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "run.safetensors"
    interrupted(path, after, monkeypatch, error=KeyboardInterrupt, save_every=1)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == [
            "optimizer.exp_avg",
            "optimizer.exp_avg_sq",
            "optimizer.step",
            "random",
            "rows",
        ]  # and nothing of the model
        assert int(file.get_tensor("optimizer.step")) == after
    assert torch.equal(tune(path), tune())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_with_accumulation_grouping_and_rare_saves(tmp_path, monkeypatch):
    path, more = tmp_path / "run.safetensors", dict(accumulate=3, group_by_length=True, save_every=4)
    interrupted(path, 3 * 11, monkeypatch, **more)
    with safe_open(path, "pt") as file:
        assert int(file.get_tensor("optimizer.step")) == 8
    assert torch.equal(tune(path, **more), tune(**more))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_goes_on_bit_for_bit(precision, tmp_path, monkeypatch):
    "The loss scale of fp16 starts so high that the first steps are skipped: it is part of the state."
    path, more = tmp_path / "run.safetensors", dict(kind="llama", precision=precision)
    interrupted(path, 12, monkeypatch, save_every=2, **more)
    assert torch.equal(tune(path, **more), tune(**more)) and not torch.equal(tune(**more), tune(kind="llama"))


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    rows = tune(path)
    monkeypatch.setattr(training, "target_loss", None)  # a step would raise
    assert torch.equal(tune(path), rows)
    with pytest.raises(TypeError):
        tune()


def test_what_is_not_its_own_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    tune(path)
    for more in (dict(n=69), dict(lr=2e-2), dict(seed=1), dict(epochs=5), dict(precision="bf16")):
        with pytest.raises(ValueError, match="run.safetensors is the checkpoint of another run"):
            tune(path, **more)
    other = tiny_model("gpt2", seed=1)
    with pytest.raises(ValueError, match="another run"):
        partial_tune(other, [7, 12, 30], examples(70), recipe(), checkpoint=path)
    tune(path, save_every=2, log_dir=str(tmp_path))  # what does not touch the result may differ
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole checkpoint.*remove it"):
            tune(path)
    path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    with pytest.raises(ValueError, match="was altered"):
        tune(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        tune(path)


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    "The disk is full in the middle of a write: what was there is still there."
    path = tmp_path / "run.safetensors"
    interrupted(path, 5, monkeypatch, save_every=5)
    whole = path.read_bytes()

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="its disk is full"):
        tune(path, save_every=5)
    monkeypatch.undo()
    assert path.read_bytes() == whole and torch.equal(tune(path), tune())


def test_no_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", None)
    monkeypatch.setattr(torch, "load", None)
    tune(tmp_path / "run.safetensors", save_every=1)
    tune(tmp_path / "run.safetensors")


VICTIM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_restart import tune
tune(Path(sys.argv[2]), n=300, epochs=8, save_every=1)
"""


def kill_and_go_on(path, rng):
    """Start the run in another process, kill it at a random moment of its training, as often as it takes.

    Returns the number of kills.
    """
    kills, deadline = 0, time.time() + 120
    while time.time() < deadline:
        before = path.stat().st_mtime_ns if path.exists() else 0
        child = subprocess.Popen(
            [*forks.PYTHON, VICTIM, str(ROOT / "tests"), str(path)], stderr=subprocess.PIPE, text=True
        )
        while child.poll() is None and (path.stat().st_mtime_ns if path.exists() else 0) == before:
            time.sleep(0.005)  # until it trains: a kill while Python starts tests nothing
        time.sleep(rng.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        _, error = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), error
        if child.returncode == 0:
            return kills
        kills += 1
        if kills == 3:
            return kills
    raise AssertionError("the run never ended")


@pytest.fixture(scope="module")
def unbroken():
    return tune(n=300, epochs=8)


def killed(seed, tmp_path, unbroken):
    path = tmp_path / "run.safetensors"
    kills = kill_and_go_on(path, random.Random(seed))
    with safe_open(path, "pt") as file:
        done = int(file.get_tensor("optimizer.step"))
    assert kills and done < 8 * 38  # it was killed, and before its end
    assert torch.equal(tune(path, n=300, epochs=8), unbroken)


@pytest.mark.slow
def test_kill_9_at_three_random_moments(tmp_path, unbroken):
    killed(0, tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 8))
def test_kill_9_at_twenty_one_random_moments(seed, tmp_path, unbroken):
    killed(seed, tmp_path, unbroken)


def test_a_checkpoint_knows_the_whole_base_model(tmp_path):
    "Two models with one embedding are not one model."
    other = tiny_model("gpt2")
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    tune(tmp_path / "run.safetensors", n=20)
    with pytest.raises(ValueError, match="another run"):
        partial_tune(other, [7, 12, 30], examples(20), recipe(), checkpoint=tmp_path / "run.safetensors")


def test_full_fine_tuning_has_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="row tuning only"):
        train(tiny_model("gpt2"), examples(4), Training(1e-2), checkpoint=tmp_path / "run.safetensors")
