"""Tuning rows equals tuning the whole matrix; what is not tuned stays bit-identical."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from transformers import Trainer, TrainingArguments

from conftest import TIED, examples, tiny_model
from kslottery import training
from kslottery.data import collate
from kslottery.training import Engine, Training, _Learner, train
from kslottery.tuning import (
    Recipe,
    active_ids,
    embed_tune,
    full_fine_tune,
    partial_transfer,
    partial_tune,
    peft_tune,
    tune_rows,
)


def recipe(lr=1e-2, epochs=1, batch_size=8, **more):
    "The same numbers for both parts."
    return Recipe(lr, epochs, lr, epochs, batch_size, progress=False, **more)


ONCE = Training(1e-2, 1, 8, progress=False)


class Plain(torch.nn.Module):
    "A model with its own loss, as anyone would train it."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels, roles=None, **kwargs):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


class AtTargets(torch.nn.Module):
    "A model with the loss at targets only, as transformers' Trainer asks for it."

    def __init__(self, model):
        super().__init__()
        self.learner = _Learner(model)
        assert self.learner.lean

    def forward(self, num_items_in_batch=None, **batch):
        return {"loss": self.learner(**batch, count=num_items_in_batch)}


def dense(model, data, lr, epochs, batch_size, folder, wrap):
    "The reference: the whole embedding matrix in a plain Trainer. Returns the weight and the gradient norms."
    model = copy.deepcopy(model).requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        seed=0,
        data_seed=0,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(wrap(model), arguments, train_dataset=data, data_collator=lambda b: collate(b, 0))
    trainer.train()
    norms = [float(e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e]
    return model.get_input_embeddings().weight.detach(), norms


@pytest.mark.parametrize("loss", ["at targets", "plain"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_embed_tuning_is_dense_adamw_bit_for_bit(kind, loss, tmp_path, monkeypatch):
    """Both sides take the loss at targets only, or both the model's own.

    The same sum in another order has other last bits.
    """
    if loss == "plain":
        monkeypatch.setattr(training, "_frozen_head", lambda model: None)
    model, data = tiny_model(kind, hidden=32), examples()
    for p in model.parameters():
        p.data.mul_(8)  # large gradients: clipping is at work
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = embed_tune(model, data, recipe(epochs=3))
    weight, norms = dense(model, data, 1e-2, 3, 8, tmp_path, Plain if loss == "plain" else AtTargets)
    assert max(norms) > 1, norms  # clipping was active
    assert rows.ids.tolist() == active_ids(data).tolist()
    assert torch.equal(weight[rows.ids], rows.weight)
    others = np.setdiff1d(np.arange(64), rows.ids)
    base = before["model.embed_tokens.weight"]
    assert torch.equal(weight[others], base[others]) and not torch.equal(weight[rows.ids], base[rows.ids])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())  # the flags are as they were


def test_rows_are_tuned_in_fp32_over_a_bf16_model():
    "A step of 2e-5 moves nearly every number of an fp32 row; in bf16 most would stand still."
    model = tiny_model("llama").bfloat16()
    rows = embed_tune(model, examples(), recipe(2e-5, 1, 4))
    assert rows.weight.dtype == torch.float32
    touched = (rows.delta(model).abs().sum(1) > 0).numpy()
    assert (rows.delta(model)[touched] != 0).float().mean() > 0.95


def test_partial_tuning_moves_its_rows_only(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = partial_tune(model, [7, 12], examples(), recipe())
    merged = rows.write(copy.deepcopy(model)).get_input_embeddings().weight
    moved = (merged != model.get_input_embeddings().weight).any(1).nonzero().flatten().tolist()
    assert moved == [7, 12] and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_seed_decides():
    model, data = tiny_model("llama"), examples()
    tuned = [partial_tune(model, [7, 12], data, recipe(seed=s)).weight for s in (0, 0, 1)]
    assert torch.equal(tuned[0], tuned[1]) and not torch.equal(tuned[0], tuned[2])


def test_partial_transfer_copies():
    model = tiny_model("llama")
    rows = embed_tune(model, examples(), recipe())
    few = partial_transfer(rows, [9, 6])
    assert few.ids.tolist() == [6, 9] and all(
        torch.equal(few.weight[j], rows.weight[rows.ids.tolist().index(i)]) for j, i in enumerate((6, 9))
    )


def test_full_fine_tuning_leaves_the_model_alone():
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = full_fine_tune(model, examples(), ONCE)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert sum(not torch.equal(before[k], v) for k, v in tuned.state_dict().items()) == len(before)


def test_no_ids_are_an_empty_ticket():
    "Nothing is trained, and nothing of the model changes."
    model = tiny_model("llama").train()
    none = partial_tune(model, [], examples(), recipe())
    assert len(none) == 0 and none.weight.shape == (0, 16) and none.mode == "input_only"
    assert model.training and all(p.requires_grad for p in model.parameters())  # nobody touched it
    assert partial_tune(tiny_model("gpt2"), [], examples(), recipe(mode="shared")).mode == "shared"


def test_what_is_refused():
    model = tiny_model("llama")
    for call in (
        lambda: tune_rows(model, [7], [], ONCE),
        lambda: embed_tune(model, []),
        lambda: full_fine_tune(model, [], ONCE),
    ):
        with pytest.raises(ValueError, match="no examples"):
            call()
    with pytest.raises(ValueError, match="diverged|NaN"):
        partial_tune(model, [7, 12], examples(), recipe(lr=5e37, epochs=10))
    with pytest.raises(ValueError, match="99 is outside the embedding"):
        partial_tune(model, [7, 99], examples(), recipe())


WRONG = dict(lr=(0.0, -1e-3, float("nan"), float("inf"), "1e-3", None), epochs=(0, -1, 2.5, "3"), batch_size=(0, 8.0))
WRONG |= dict(seed=(-1, 0.5))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_number_is_one_sentence_when_the_object_is_made(name):
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=f"^{name} is {value!r}: give a (whole|finite) number"):
            Training(**dict(lr=1e-2) | {name: value})
        for field in (name,) if name in ("batch_size", "seed") else (f"{name}_embed", f"{name}_partial"):
            with pytest.raises(ValueError, match=f"^{field} is {value!r}: give a (whole|finite) number"):
                Recipe(**{field: value})


def test_a_wrong_engine_is_one_sentence_when_it_is_made():
    for wrong, words in (
        (dict(accumulate=0), "accumulate is 0: give a whole number of at least 1"),
        (dict(save_every=0), "save_every is 0"),
        (dict(precision="fp8"), "precision is 'fp8': choose no, bf16 or fp16"),
        (dict(share_prefix=True, compile=True), "neither compile"),
        (dict(share_prefix=True, activation_checkpointing=True), "activation checkpointing"),
    ):
        with pytest.raises(ValueError, match=words):
            Engine(**wrong)
    with pytest.raises(ValueError, match="mode is 'output': choose input_only, shared, head, both"):
        Recipe(mode="output")


def test_a_recipe_goes_through_json():
    ours = Recipe(1e-3, 2, 1e-1, 4, 16, 7, "shared", False, Engine(2, "bf16", save_every=5, log_dir="logs"))
    assert Recipe.from_dict(json.loads(json.dumps(ours.as_dict()))) == ours != Recipe()
    assert ours.embed == Training(1e-3, 2, 16, 7, False, ours.engine)
    assert ours.partial == Training(1e-1, 4, 16, 7, False, ours.engine)
    assert Recipe.from_dict({}) == Recipe()
    for wrong in (dict(rate=1), dict(engine=dict(turbo=True))):
        with pytest.raises(ValueError, match="no recipe.*(rate|turbo).*another version"):
            Recipe.from_dict(wrong)
    with pytest.raises(ValueError, match="epochs_embed is 0"):
        Recipe.from_dict(ours.as_dict() | dict(epochs_embed=0))


def test_peft_adapters_train_in_the_same_loop():
    "The adapter moves, the copy's base does not, and the seed decides."
    model, config = tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one, two, other = (
        peft_tune(model, copy.deepcopy(config), examples(), Training(1e-2, 1, 8, seed, False)) for seed in (0, 0, 1)
    )
    learned = lambda adapted: {k: v for k, v in adapted.named_parameters() if v.requires_grad}
    assert all("lora_" in k for k in learned(one)) and all(v.any() for k, v in learned(one).items() if "lora_B" in k)
    assert all(torch.equal(v, learned(two)[k]) for k, v in learned(one).items())
    assert not all(torch.equal(v, learned(other)[k]) for k, v in learned(one).items())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    base = one.unload().state_dict()
    assert all(torch.equal(before[k], base[k]) for k in before)


def test_fp16_on_the_loss_scale():
    "A step whose gradient overflows is skipped, and the scale halves until it fits; the rows are fp32."
    model = tiny_model("llama", hidden=32)
    exact, half = (embed_tune(model, examples(), recipe(epochs=3, engine=Engine(precision=p))) for p in ("no", "fp16"))
    assert half.weight.dtype == torch.float32 and not torch.equal(half.weight, exact.weight)
    assert torch.nn.functional.cosine_similarity(half.delta(model).flatten(), exact.delta(model).flatten(), 0) > 0.9


def test_the_model_comes_back_as_it_was():
    "Also when the training fails: flags, activation checkpointing, hooks; it is in evaluation mode then."
    model, rows = tiny_model("llama").train(), None
    model.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    rows = training.TunedRows.of(model, [7])
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: module.training and 1 / 0 or None)
    with pytest.raises(ZeroDivisionError):
        train(
            model, examples(), Training(1e-2, engine=Engine(activation_checkpointing=True), progress=False), rows=rows
        )
    handle.remove()
    assert [p.requires_grad for p in model.parameters()] == flags and not model.is_activation_checkpointing
    assert not model.training and not model.get_input_embeddings()._forward_hooks
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("kind", TIED)
def test_shared_rows_are_what_peft_trains(kind):
    "On a tied model, PEFT's trainable tokens learn from input and output, as shared rows do; input_only rows do not."
    model, two = tiny_model(kind), Training(1e-2, 2, 8, progress=False)
    adapted = peft_tune(model, TrainableTokensConfig(token_indices=[7, 12]), examples(), two)
    theirs = adapted.get_input_embeddings().trainable_tokens_delta["default"].detach()
    shared = tune_rows(model, [7, 12], examples(), two, mode="shared")
    torch.testing.assert_close(shared.weight.detach(), theirs, rtol=0, atol=1e-4)
    assert (tune_rows(model, [7, 12], examples(), two).weight - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["head", "both"])
def test_rows_of_the_output_are_what_peft_trains(mode, tmp_path):
    "On an untied model, with one or two targets; a checkpoint holds them."
    model, two = tiny_model("llama"), Training(1e-2, 2, 8, progress=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    targets = ["embed_tokens", "lm_head"][mode == "head" :]
    config = TrainableTokensConfig(token_indices=[7, 12], target_modules=targets)
    adapted = peft_tune(model, config, examples(), two)
    theirs = [p.detach() for name, p in adapted.named_parameters() if "trainable_tokens_delta" in name]
    rows = tune_rows(model, [7, 12], examples(), two, mode=mode, checkpoint=tmp_path / "run")
    torch.testing.assert_close(rows.weight.detach(), torch.cat(theirs, 1), rtol=0, atol=1e-4)
    assert rows.delta(model).abs().min() > 0 and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    again = tune_rows(model, [7, 12], examples(), two, mode=mode, checkpoint=tmp_path / "run")  # all steps are done
    assert torch.equal(again.weight, rows.weight)
