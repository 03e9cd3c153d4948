"""Tuning rows equals tuning the whole matrix; what is not tuned stays bit-identical."""

import copy

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from conftest import tiny_model
from kslottery.data import Example, collate
from kslottery.tuning import active_ids, embed_tune, full_fine_tune, partial_transfer, partial_tune, tune_rows


def examples(n=24, low=5, high=40, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        ids = [1, *rng.integers(low, high, rng.integers(3, 9)).tolist(), 2]
        made.append(Example(str(i), ids, [-100, -100, *ids[2:]], [1] * len(ids), 2))
    return made


def dense(model, data, lr, epochs, batch_size, folder):
    "The reference: the whole embedding matrix in a plain Trainer. Returns the weight and the gradient norms."
    model = copy.deepcopy(model).requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, labels, **kwargs):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch_size, num_train_epochs=epochs, learning_rate=lr, lr_scheduler_type="cosine", warmup_steps=0.03, weight_decay=0.0,
        max_grad_norm=1.0, optim="adamw_torch", seed=0, data_seed=0, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(Plain(), arguments, train_dataset=data, data_collator=lambda b: {k: v for k, v in collate(b, 0).items() if k != "roles"})
    trainer.train()
    norms = [float(e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e]
    return model.get_input_embeddings().weight.detach(), norms


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_embed_tuning_is_dense_adamw_bit_for_bit(kind, tmp_path):
    model, data = tiny_model(kind, hidden=32), examples()
    for p in model.parameters():
        p.data.mul_(8)  # large gradients: clipping is at work
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = embed_tune(model, data, lr=1e-2, epochs=3, batch_size=8, progress=False)
    weight, norms = dense(model, data, 1e-2, 3, 8, tmp_path)
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
