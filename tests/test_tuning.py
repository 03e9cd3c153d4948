"""Tuning rows equals tuning the whole matrix; what is not tuned stays bit-identical."""

import copy

import numpy as np
import pytest
import torch
from peft import TrainableTokensConfig
from transformers import Trainer, TrainingArguments

from conftest import TIED, examples, tiny_model
from kslottery import tuning
from kslottery.data import collate
from kslottery.tuning import active_ids, embed_tune, full_fine_tune, partial_transfer, partial_tune, peft_tune, tune_rows


class Plain(torch.nn.Module):
    "A model with its own loss, as anyone would train it."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels, roles=None, **kwargs):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


def dense(model, data, lr, epochs, batch_size, folder, wrap):
    "The reference: the whole embedding matrix in a plain Trainer. Returns the weight and the gradient norms."
    model = copy.deepcopy(model).requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch_size, num_train_epochs=epochs, learning_rate=lr, lr_scheduler_type="cosine", warmup_steps=0.03, weight_decay=0.0,
        max_grad_norm=1.0, optim="adamw_torch", seed=0, data_seed=0, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(wrap(model), arguments, train_dataset=data, data_collator=lambda b: collate(b, 0))
    trainer.train()
    norms = [float(e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e]
    return model.get_input_embeddings().weight.detach(), norms


@pytest.mark.parametrize("loss", ["at targets", "plain"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_embed_tuning_is_dense_adamw_bit_for_bit(kind, loss, tmp_path, monkeypatch):
    "Both sides take the loss at targets only, or both the model's own: the same sum in another order has other last bits."
    if loss == "plain":
        monkeypatch.setattr(tuning, "_frozen_head", lambda model: None)
    model, data = tiny_model(kind, hidden=32), examples()
    for p in model.parameters():
        p.data.mul_(8)  # large gradients: clipping is at work
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = embed_tune(model, data, lr=1e-2, epochs=3, batch_size=8, progress=False)
    weight, norms = dense(model, data, 1e-2, 3, 8, tmp_path, Plain if loss == "plain" else tuning._Wrapped)
    assert max(norms) > 1, norms  # clipping was active
    assert rows.ids.tolist() == active_ids(data).tolist()
    assert torch.equal(weight[rows.ids], rows.rows)
    others = np.setdiff1d(np.arange(64), rows.ids)
    base = before["model.embed_tokens.weight"]
    assert torch.equal(weight[others], base[others]) and not torch.equal(weight[rows.ids], base[rows.ids])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())  # the flags are as they were


def test_rows_are_tuned_in_fp32_over_a_bf16_model():
    "A step of 2e-5 moves nearly every number of an fp32 row; in bf16 most would stand still."
    model = tiny_model("llama").bfloat16()
    rows = embed_tune(model, examples(), lr=2e-5, epochs=1, batch_size=4, progress=False)
    assert rows.rows.dtype == torch.float32
    touched = (rows.delta(model).abs().sum(1) > 0).numpy()
    assert (rows.delta(model)[touched] != 0).float().mean() > 0.95


def test_partial_tuning_moves_its_rows_only(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = partial_tune(model, [7, 12], examples(), lr=1e-2, epochs=1, batch_size=8, progress=False)
    merged = rows.merged(model).get_input_embeddings().weight
    moved = (merged != model.get_input_embeddings().weight).any(1).nonzero().flatten().tolist()
    assert moved == [7, 12] and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_seed_decides():
    model, data = tiny_model("llama"), examples()
    tuned = [partial_tune(model, [7, 12], data, lr=1e-2, epochs=1, batch_size=8, seed=s, progress=False).rows for s in (0, 0, 1)]
    assert torch.equal(tuned[0], tuned[1]) and not torch.equal(tuned[0], tuned[2])


def test_partial_transfer_copies():
    model = tiny_model("llama")
    rows = embed_tune(model, examples(), lr=1e-2, epochs=1, batch_size=8, progress=False)
    few = partial_transfer(rows, [9, 6])
    assert few.ids.tolist() == [6, 9] and all(torch.equal(few.rows[j], rows.rows[rows.ids.tolist().index(i)]) for j, i in enumerate((6, 9)))


def test_full_fine_tuning_leaves_the_model_alone():
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = full_fine_tune(model, examples(), lr=1e-2, epochs=1, batch_size=8, progress=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert sum(not torch.equal(before[k], v) for k, v in tuned.state_dict().items()) == len(before)


def test_what_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no rows to tune.*top_k"):
        partial_tune(model, [], examples())
    with pytest.raises(ValueError, match="no examples"):
        tune_rows(model, [7], [], lr=1e-2, epochs=1)
    with pytest.raises(ValueError, match="diverged|NaN"):
        partial_tune(model, [7, 12], examples(), lr=float("inf"), epochs=1, batch_size=8, progress=False)
    for wrong in (dict(epochs=0), dict(epochs=-1), dict(batch_size=0), dict(lr=0.0), dict(lr=float("nan"))):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            partial_tune(model, [7], examples(), **dict(lr=1e-2, epochs=1, batch_size=8, progress=False) | wrong)


@pytest.mark.parametrize("kind", TIED)
def test_shared_rows_are_what_peft_trains(kind):
    "On a tied model, PEFT's trainable tokens learn from input and output. So do shared rows; input_only rows go elsewhere."
    model, settings = tiny_model(kind), dict(lr=1e-2, epochs=2, batch_size=8, progress=False)
    adapted = peft_tune(model, TrainableTokensConfig(token_indices=[7, 12]), examples(), **settings)
    theirs = adapted.get_input_embeddings().trainable_tokens_delta["default"].detach()
    torch.testing.assert_close(tune_rows(model, [7, 12], examples(), mode="shared", **settings).rows.detach(), theirs, rtol=0, atol=1e-4)
    assert (tune_rows(model, [7, 12], examples(), **settings).rows - theirs).abs().max() > 1e-2
