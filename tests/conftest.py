"""Shared pieces: the repository, tiny models of every architecture, one fast quickstart run for all that look at it."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

import forks
from kslottery.cli import app
from kslottery.data import Example

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # here, as tests start processes that import this file
shared = importlib.import_module("shared").shared
DATA, MODELS = shared("data"), shared("models")  # real text and a model of it, where a developer has them
TIED = ("gemma", "gpt2", "bloom")
ARCHITECTURES = ("llama", "qwen2", "mistral", *TIED)
LONG = ("test_audit_worlds", "test_audit", "test_quickstart", "test_wheel", "test_docs", "test_ticket")
ALONE = ("test_notebooks", "test_blocks")  # every test of these files can run anywhere
WORDS = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
WORDS.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
TOY = PreTrainedTokenizerFast(tokenizer_object=WORDS, bos_token="t1", eos_token="t63", pad_token="t0", unk_token="t0")


class Letters:
    "The least a tokenizer must do: one token, one word; 0, 1 and 2 are special."

    eos_token_id, pad_token_id, bos_token_id = 2, 0, 1

    def decode(self, ids, skip_special_tokens):
        return " ".join(f"t{i}" for i in ids if not (skip_special_tokens and i < 3))


def tiny_model(kind, vocabulary=64, hidden=16, seed=0):
    "A random causal LM of one layer; gpt2, gemma and bloom tie input and output embeddings, the others do not."
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        pad_token_id=0,
    )
    untied = dict(num_key_value_heads=1, tie_word_embeddings=False)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, **untied))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**shape, **untied))
    elif kind == "gemma":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, num_key_value_heads=1, head_dim=8))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_embd=hidden,
                n_layer=1,
                n_head=2,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    else:
        model = BloomForCausalLM(
            BloomConfig(vocab_size=vocabulary, hidden_size=hidden, n_layer=1, n_head=2, pad_token_id=0)
        )
    return model.eval()


def half_and_tied():
    "A tiny Qwen2 in bfloat16 whose head is its input embedding."
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return Qwen2ForCausalLM(Qwen2Config(**shape, intermediate_size=32, tie_word_embeddings=True)).bfloat16().eval()


def talker(kind, **shape):
    """A tiny model with heavy blocks, whose greedy text depends on every row it reads.

    (A random tied model at the usual scale repeats its last token.)
    """
    model = tiny_model(kind, **shape)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p is not model.get_input_embeddings().weight:
                p *= 20
    return model


def examples(n=24, low=5, high=40, seed=0):
    "Short random examples with ids in [low, high): a target follows two prompt tokens."
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        ids = [1, *rng.integers(low, high, rng.integers(3, 9)).tolist(), 2]
        made.append(Example(str(i), ids, [-100, -100, *ids[2:]], [1] * len(ids), 2))
    return made


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return tiny_model(request.param)


def pytest_configure(config):
    "Kernels and commands are forks of one process (forks.py); parallel workers inherit its address."
    if forks.ADDRESS not in os.environ and not config.option.collectonly:
        config.forks = forks.Server(Path(tempfile.mkdtemp(prefix="kslottery-tests-")))


def pytest_unconfigure(config):
    if hasattr(config, "forks"):
        config.forks.close()


def pytest_xdist_make_scheduler(config, log):
    "A file's tests share its fixtures and stay together; pages stand alone."
    from xdist.scheduler import LoadFileScheduling

    class FilesAndPages(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return nodeid if Path(file).stem in ALONE else file

    return FilesAndPages(config, log)


def pytest_collection_modifyitems(items):
    "Pages fill up at the end; the files that take longest come first."
    items.sort(key=lambda item: (item.path.stem in ALONE, item.path.stem not in LONG))  # stable


def kslottery(*words, cwd=None):
    "Run the command as a user would: (exit status, standard output, standard error)."
    done = subprocess.run(["kslottery", *map(str, words)], capture_output=True, text=True, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def invoke(*words):
    "The command in this process: (exit status, standard output, standard error)."
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def given(parameters):
    "The words that set a notebook's parameters on the command line."
    return [word for name, value in parameters.items() for word in ("-p", f"{name}={value}")]


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    "The folder of one quickstart run at its fast size, by the command line, and what the command printed."
    out = tmp_path_factory.mktemp("run") / "quickstart"
    status, said, progress = kslottery("run", "quickstart", "-p", "fast=true", "-p", f"out={out}", cwd=out.parent)
    assert status == 0, progress
    return out, said, progress


@pytest.fixture(scope="session")
def results(quickstart):
    return json.loads((quickstart[0] / "results.json").read_text())
