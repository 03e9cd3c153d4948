"""How the machine runs a training: what only trades time for memory leaves the rows as they were."""

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from conftest import examples, tiny_model
from kslottery.data import Example, collate
from kslottery.rows import TunedRows
from kslottery.training import Engine, Training, _Learner
from kslottery.tuning import Recipe, embed_tune, full_fine_tune, partial_tune


def recipe(lr=1e-2, epochs=2, batch_size=8, mode="input_only", **engine):
    "The same settings for both trainings, on some engine."
    return Recipe(lr, epochs, lr, epochs, batch_size, mode=mode, progress=False, engine=Engine(**engine))


def tune(model, **engine):
    return embed_tune(model, examples(50), recipe(**engine))  # 50: the last batch holds 2


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_parts_make_the_same_batch(parts):
    "The loss is the mean over a batch's targets, not of its parts' means; a batch smaller than its parts is one step."
    model = tiny_model("llama", hidden=32)
    assert (tune(model).weight - tune(model, accumulate=parts).weight).abs().max() < 1e-6
    seen = []
    for engine in (Engine(), Engine(accumulate=parts)):
        training = Training(1e-2, 2, 8, progress=False, engine=engine)
        tuned = full_fine_tune(model, examples(50), training)  # the plain loss
        seen.append(tuned.lm_head.weight)
    assert (seen[0] - seen[1]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activation_checkpointing_changes_nothing(kind):
    model = tiny_model(kind, hidden=32)
    assert torch.equal(tune(model).weight, tune(model, activation_checkpointing=True).weight)
    assert not model.is_activation_checkpointing  # off again


def test_mixed_precision_keeps_fp32_rows():
    model = tiny_model("llama", hidden=32)
    exact, mixed = tune(model).delta(model), tune(model, precision="bf16").delta(model)
    assert mixed.dtype == torch.float32 and not torch.equal(exact, mixed)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), mixed.flatten(), 0) > 0.9


def test_a_frozen_bf16_base_and_rows_that_all_move():
    "In bf16 a step of 2e-5 would leave most numbers as they are; in fp32 every number that has a gradient moves."
    model = tiny_model("llama", hidden=32).bfloat16()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = np.arange(5, 40)
    rows = partial_tune(model, ids, examples(50), recipe(2e-5, 1))
    assert rows.weight.dtype == torch.float32 and (rows.weight != TunedRows.of(model, ids).weight).all()
    assert all(torch.equal(v, before[k]) and v.dtype == torch.bfloat16 for k, v in model.state_dict().items())


def test_grouped_batches_train_all_the_same():
    model = tiny_model("llama", hidden=32)
    plain, grouped = tune(model), tune(model, group_by_length=True)
    moved = (grouped.delta(model).abs().sum(1) > 0).tolist()
    assert moved == [
        i != 2 for i in grouped.ids.tolist()
    ]  # 2 closes every example: nothing follows it, so it has no gradient
    assert not torch.equal(grouped.weight, plain.weight)  # other batches, other rows: that is why it is not the default


@pytest.mark.slow
def test_torch_compile():
    model = tiny_model("llama", hidden=32)
    # one batch: one shape to compile
    plain, compiled = (embed_tune(model, examples(8), recipe(compile=flag)).weight for flag in (False, True))
    assert (plain - compiled).abs().max() < 1e-5


def test_tensorboard(tmp_path):
    tune(tiny_model("llama"), log_dir=str(tmp_path))
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="no_such_option"):
        tune(tiny_model("llama"), no_such_option=1)


def templated(n):
    "Sentences that begin with the same 12 tokens, 7 only there, then have 1-4 tokens of their own and a target."
    rng, made = np.random.default_rng(0), []
    prefix = [1, *range(20, 28), 7, 28, 29]
    for i in range(n):
        source, target = (
            rng.integers(8, 64, rng.integers(1, 5)).tolist(),
            rng.integers(8, 64, rng.integers(4, 12)).tolist(),
        )
        prompt = len(prefix) + len(source)
        made.append(
            Example(str(i), prefix + source + target, [-100] * prompt + target, [1] * (prompt + len(target)), prompt)
        )
    return made


def windowed(kind):
    "A tiny model without dropout, or one of two layers that look back 5 tokens, gemma's second one at all."
    shape = dict(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        pad_token_id=0,
        sliding_window=5,
    )
    torch.manual_seed(0)
    if kind == "sliding":
        return MistralForCausalLM(MistralConfig(**shape, tie_word_embeddings=False))
    if kind == "sliding gemma":
        return Gemma3ForCausalLM(
            Gemma3TextConfig(**shape, head_dim=8, layer_types=["sliding_attention", "full_attention"])
        )
    model = tiny_model(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


SHARED = ["llama", "qwen2", "mistral", "gpt2", "gemma", "bloom", "sliding", "sliding gemma"]


@pytest.mark.parametrize("kind", SHARED)
def test_a_shared_prefix_gives_the_same_rows(kind):
    "Also with a sliding window (5) shorter than the prefix, and in a batch whose prefix differs from the others'."
    model, data = windowed(kind), templated(20)
    seen, calls = [], []
    for share in (False, True):
        handle = model.get_input_embeddings().register_forward_hook(
            lambda m, args, out: calls.append(tuple(args[0].shape))
        )
        settings = recipe(1e-3, 1, 5, share_prefix=share)
        seen.append(partial_tune(model, np.arange(3, 64), data, settings).weight)
        handle.remove()
        assert ((1, 11) in calls) == share  # the twelfth predicts
    assert (seen[0] - TunedRows.of(model, np.arange(3, 64)).weight).abs().max() > 1e-4
    assert (seen[0] - seen[1]).abs().max() < 2e-5


@pytest.mark.parametrize("kind", SHARED)
def test_a_shared_prefix_gives_the_same_gradients(kind):
    model = windowed(kind).requires_grad_(False)
    batch, rows = collate(templated(6), 0), TunedRows.of(model, np.arange(3, 64))
    with rows.applied(model):
        plain, shared = (_Learner(model, rows, share)(**batch) for share in (False, True))
        one, two = (torch.autograd.grad(loss, rows.weight)[0] for loss in (plain, shared))
    assert abs(plain - shared) < 1e-5 * plain
    assert (one - two).norm() < 1e-5 * one.norm()
    assert (one[7 - 3] != 0).all()  # a token that only the prefix holds: the gradient comes through the cache


def test_a_prefix_that_cannot_be_shared_is_refused():
    data, settings = templated(4), recipe(1e-3, 1, share_prefix=True)
    with pytest.raises(ValueError, match="GPT2LMHeadModel .it has dropout"):
        embed_tune(tiny_model("gpt2"), data, settings)
    with pytest.raises(ValueError, match="activation checkpointing"):
        embed_tune(tiny_model("llama"), data, recipe(1e-3, 1, share_prefix=True, activation_checkpointing=True))
    with pytest.raises(ValueError, match="the long way"):
        embed_tune(windowed("gpt2"), data, recipe(1e-3, 1, mode="shared", share_prefix=True))
    with pytest.raises(ValueError, match="more than keys and values"):
        embed_tune(MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)), data, settings)
