"""What the library uses of others beyond their documentation: one list, and a test for each entry.

A name with an underscore, or a behaviour that no page of the other library promises. A test that fails says in a
sentence what changed, and what we wanted it for. Nothing else of the kind is used: a test looks for it.
"""

import ast
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from conftest import ROOT, tiny_model


class Internal(NamedTuple):
    library: str
    what: str
    why: str


INTERNALS = (
    Internal("sacrebleu", "_extract_corpus_statistics", "counts of each sentence, taken once for all resamples"),
    Internal("sacrebleu", "_compute_score_from_stats", "the corpus score of a sum of such counts"),
    Internal("sacrebleu", "tokenizer_signature", "spBLEU's signature names the model file"),
    Internal("sacrebleu", "SPM_MODELS, SACREBLEU_DIR", "where sacrebleu keeps the Flores tokenizers"),
    Internal("transformers", "embed_scale", "the factor of a scaled embedding (Gemma), which tuned rows get too"),
    Internal("transformers", "num_items_in_batch", "a model's own loss as a sum over targets, divided by our count"),
    Internal("transformers", "DynamicLayer", "tells whether a model remembers keys and values only (share_prefix)"),
    Internal("transformers", "batch_repeat_interleave", "repeats the cache of a shared prefix, with its gradients"),
    Internal("transformers", "disable_input_require_grads", "takes a hook away that activation checkpointing leaves"),
    Internal("tokenizers", "repr of the decoder", "tells byte-level pieces, to show them as text"),
    Internal("torch", "full_tensor", "what FSDP2 sharded is a DTensor, and gathered by this"),
    Internal("torch", "RemovableHandle as a context manager", "hooks that go when a block ends"),
    Internal("torch", "functional_call over another forward", "asks an embedding for rows, without its hooks"),
    Internal("torch", "_is_mkldnn_bf16_supported", "a benchmark: whether bf16 is worth timing on this processor"),
    Internal("peft", "trainable_tokens_delta", "the name of the rows in an adapter's file"),
    Internal("nbdev", "FilterDefaults.base_procs", "the site without Quarto: nbdev's processing, cells not run"),
    Internal("nbdev", "refresh_quarto_yml", "the site with Quarto: nbdev's settings for it"),
)
CHECKS = {}


def check(what):
    return lambda function: CHECKS.setdefault(what, function)


def bleu(references=None):
    from sacrebleu.metrics import BLEU

    return BLEU(references=references, force=True)


TEXTS, REFERENCES = ("the cat sat on the mat", "a dog barks"), ["the cat sat on a mat", "the dog barks"]


@check("_extract_corpus_statistics")
def counts_of_sentences():
    counts = np.array(bleu([REFERENCES])._extract_corpus_statistics(TEXTS, None), dtype=float)
    assert counts.shape == (2, 10), "a row for each sentence: two lengths, four matches, four totals"
    alone = np.array(bleu([REFERENCES[1:]])._extract_corpus_statistics(TEXTS[1:], None), dtype=float)
    assert (counts[1] == alone[0]).all(), "a sentence's counts do not depend on the others"


@check("_compute_score_from_stats")
def scores_of_sums():
    metric = bleu([REFERENCES])
    sums = np.sum(metric._extract_corpus_statistics(TEXTS, None), axis=0).tolist()
    score = bleu()._compute_score_from_stats(sums).score
    assert score == metric.corpus_score(list(TEXTS), None).score, "the score of the sums is the corpus score"


@check("tokenizer_signature")
def signature_of_the_tokenizer():
    metric = bleu([REFERENCES])
    metric.tokenizer_signature += "|spm:0123"
    metric.corpus_score(list(TEXTS), None)
    assert "|spm:0123" in str(metric.get_signature()), "what is added to it is part of the metric's signature"


@check("SPM_MODELS, SACREBLEU_DIR")
def models_of_flores():
    from sacrebleu.tokenizers import tokenizer_spm

    for name in ("flores101", "flores200"):
        assert tokenizer_spm.SPM_MODELS[name]["url"].startswith("https://"), "each has an address"
    source = inspect.getsource(tokenizer_spm.TokenizerSPM)
    place = 'os.path.join(SACREBLEU_DIR, "models", os.path.basename(SPM_MODELS[key]["url"]))'
    assert place in source, "a file lies in the folder models of SACREBLEU_DIR, by the last part of its address"


@check("embed_scale")
def scale_of_gemma():
    embedding = tiny_model("gemma").get_input_embeddings()
    own = embedding(torch.tensor([3]))[0]
    assert torch.equal(own, embedding.weight[3] * embedding.embed_scale), "the embedding multiplies a row by it"


@check("num_items_in_batch")
def loss_by_our_count():
    x = torch.tensor([[1, 7, 9, 5]])
    for kind in ("llama", "gpt2", "gemma", "bloom"):
        model = tiny_model(kind)
        mean, ours = model(x, labels=x).loss, model(x, labels=x, num_items_in_batch=torch.tensor(6)).loss
        assert torch.isclose(3 * mean, 6 * ours), f"{kind}: the loss is the sum over targets, divided by what we give"


@check("DynamicLayer")
def layers_of_a_cache():
    from transformers import DynamicCache, MambaConfig
    from transformers.cache_utils import DynamicLayer

    plain = lambda config: all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=config).layers)
    mamba = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)
    assert plain(tiny_model("llama").config), "a cache made for a model of keys and values has only such layers"
    assert not plain(mamba), "a cache made for a recurrent model has others"


@check("batch_repeat_interleave")
def a_cache_that_is_repeated():
    model = tiny_model("llama")
    embedded = model.get_input_embeddings()(torch.tensor([[1, 7, 9]])).detach().requires_grad_()
    cache = model(inputs_embeds=embedded, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    x = torch.tensor([[5], [6]])
    both = model(x, past_key_values=cache, use_cache=True).logits[:, 0]
    whole = model(torch.tensor([[1, 7, 9, 5], [1, 7, 9, 6]])).logits[:, -1]
    torch.testing.assert_close(both, whole, msg="each of the repeated goes on as if it had read the prefix itself")
    both.sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0, "gradients go back through the cache"


@check("disable_input_require_grads")
def a_hook_that_is_left():
    model = tiny_model("llama")
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing, "what is switched on is told"
    model.activation_checkpointing_disable()
    model.disable_input_require_grads()
    assert not model.is_activation_checkpointing, "what is switched off is told"
    assert not model.requires_grad_(False)(torch.tensor([[1]])).logits.requires_grad, "no hook is left"


@check("repr of the decoder")
def decoder_of_byte_level_pieces():
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    assert "ByteLevel" in str(tokenizer.decoder), "a byte-level decoder says so"
    tokenizer.decoder = decoders.Metaspace()
    assert "ByteLevel" not in str(tokenizer.decoder), "another does not"


@check("full_tensor")
def shards_are_gathered():
    from torch.distributed.tensor import DTensor

    assert hasattr(DTensor, "full_tensor"), "a sharded tensor has it"
    assert not hasattr(torch.zeros(1), "full_tensor"), "a plain tensor does not: this is how the two are told apart"


@check("RemovableHandle as a context manager")
def hooks_end_with_their_block():
    layer = torch.nn.Linear(2, 2)
    with layer.register_forward_hook(lambda module, args, output: output * 0):
        assert not layer(torch.ones(2)).any(), "what a hook returns stands in for the output"
    with layer.register_forward_pre_hook(lambda module, args: (args[0][:0],)):
        assert layer(torch.ones(3, 2)).shape == (0, 2), "what a hook returns stands in for the input"
    assert layer(torch.ones(3, 2)).any(), "after the block they are gone"


@check("functional_call over another forward")
def forward_without_hooks():
    layer, asker = torch.nn.Embedding(3, 2), torch.nn.Module()
    asker.layer, asker.forward = layer, layer.forward
    with layer.register_forward_hook(lambda module, args, output: output * 0):
        other = torch.func.functional_call(asker, {"layer.weight": torch.ones(3, 2)}, (torch.tensor([1]),))
    assert other.tolist() == [[1.0, 1.0]], "the weight that is given is read, and no hook runs"


@check("_is_mkldnn_bf16_supported")
def a_processor_with_bf16():
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool), "it says yes or no"


@check("trainable_tokens_delta")
def names_in_an_adapter():
    from peft import TrainableTokensConfig, get_peft_model, get_peft_model_state_dict

    settings = TrainableTokensConfig(token_indices=[7], target_modules=["model.embed_tokens"], task_type="CAUSAL_LM")
    stored = get_peft_model_state_dict(get_peft_model(tiny_model("llama"), settings))
    names = list(stored)
    assert names == ["base_model.model.model.embed_tokens.trainable_tokens_delta"], (
        f"an adapter of one row holds {names}"
    )
    assert stored[names[0]].shape == (1, 16), "the row itself, not a difference in two factors"


@check("FilterDefaults.base_procs")
def processing_of_a_notebook():
    from execnb.nbio import mk_cell, new_nb
    from nbdev.process import Processor
    from nbdev.processors import FilterDefaults, exec_show_docs

    assert exec_show_docs in FilterDefaults().base_procs(), (
        "the step that runs cells is one of the steps, to be replaced"
    )
    notebook = new_nb([mk_cell("#| default_exp rows\n", "code")])
    seen = []

    class Look(Processor):
        def begin(self):
            seen.extend(c.directives_ for c in self.nb.cells)

    class Filter(FilterDefaults):
        def base_procs(self):
            return [Look]

    Filter()(notebook)
    assert seen and seen[0]["default_exp"] == ["rows"], "a step sees the cells and their directives"


@check("refresh_quarto_yml")
def settings_for_quarto():
    from nbdev.quarto import refresh_quarto_yml

    assert not inspect.signature(refresh_quarto_yml).parameters, "it takes no arguments"


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda i: f"{i.library}: {i.what}")
def test_a_library_is_still_what_we_take_it_for(internal):
    try:
        CHECKS[internal.what]()
    except (AssertionError, AttributeError, ImportError, KeyError, TypeError) as error:
        wanted = str(error).splitlines()[0]  # pytest adds what it compared
        changed = f"{internal.library} has changed, or our use of {internal.what} ({internal.why}). Expected: {wanted}"
        pytest.fail(changed, pytrace=False)


def test_the_list_is_whole():
    "No name with an underscore of another library's is used that the list does not hold."
    assert sorted(CHECKS) == sorted(i.what for i in INTERNALS)
    named = {"_asdict", "_replace", "_fields"}  # a named tuple's, documented with this underscore
    ours, used = set(), {}
    for path in [*(ROOT / "kslottery").glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "nbs" / "_render.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.stem != "_modidx" else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Attribute):
                used.setdefault(node.attr, path.name)
            elif isinstance(node, ast.ImportFrom):
                used |= {name.name: path.name for name in node.names}
    foreign = {name: where for name, where in used.items() if re.match("_[a-z]", name) and name not in ours | named}
    assert foreign.keys() <= {i.what for i in INTERNALS}, f"used, but not in the list: {foreign}"


def test_the_loop_leaves_transformers_trainer_alone():
    "It is accelerate's public interface and plain torch: no Trainer is subclassed, none of its folders written."
    source = Path(ROOT / "kslottery" / "training.py").read_text(encoding="utf-8")
    assert not re.search(r"\bTrainer\b|trainer_state|TrainingArguments|_n_gpu", source)
