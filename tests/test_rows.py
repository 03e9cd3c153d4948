"""The row mechanism on every architecture: what it reads, what it leaves alone, and who may read it."""

import copy

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from conftest import ARCHITECTURES, tiny_model
from kslottery.data import Role
from kslottery.rows import TunedRows, input_embedding, sample_ids

X = torch.tensor([[1, 7, 9, 7, 5], [3, 9, 9, 3, 7]])


def random_rows(ids=(3, 7, 9), d=16, seed=0):
    return TunedRows(ids, torch.randn(len(ids), d, generator=torch.Generator().manual_seed(seed)))


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_equals_merging_and_leaves_no_trace(model, dtype):
    model, rows = model.to(dtype), random_rows()
    before = state(model)
    with torch.no_grad():
        plain = model(X).logits
        with rows.applied(model):
            read = model(X).logits
        merged = rows.merged(model)
        assert torch.equal(read, merged(X).logits) and not torch.equal(read, plain)
        assert torch.equal(model(X).logits, plain)
    after = state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not model.get_input_embeddings()._forward_hooks
    base, changed = (m.get_input_embeddings().weight for m in (model, merged))
    assert torch.equal(changed[[3, 7, 9]], rows.rows.to(dtype))
    others = np.setdiff1d(np.arange(64), [3, 7, 9])
    assert torch.equal(changed[others], base[others])


def test_the_models_own_rows_change_nothing(model):
    with torch.no_grad():
        plain = model(X).logits
        with TunedRows.of(model, range(64)).applied(model):
            assert torch.equal(model(X).logits, plain)


def test_a_hook_is_removed_when_the_block_fails(model):
    with pytest.raises(ZeroDivisionError), random_rows().applied(model):
        raise ZeroDivisionError
    assert not model.get_input_embeddings()._forward_hooks


def test_gradients_reach_the_rows_and_nothing_else(model):
    model.requires_grad_(False)
    rows = random_rows()
    with rows.applied(model):
        model(X, labels=X).loss.backward()
    assert (rows.rows.grad.abs().sum(1) > 0).all() and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("beams", [1, 4])
def test_gates_open_and_shut_in_generation(model, beams):
    rows = random_rows(range(64), seed=1)
    roles = torch.tensor([[0, 1, 2, 2, 1], [0, 0, 1, 2, 1]])
    settings = dict(
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]), max_new_tokens=6, num_beams=beams, do_sample=False, pad_token_id=0, eos_token_id=63
    )
    plain, merged = (m.generate(X, **settings) for m in (model, rows.merged(model)))
    for cache in (True, False):
        for gate, expected in ((list(Role), merged), ([], plain)):
            with rows.applied(model, roles=roles, read_by=gate):
                assert torch.equal(model.generate(X, use_cache=cache, **settings), expected)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_history_gate_reads_each_generated_token(kind):
    "Rows read by the target only: generation under the cache equals a whole pass over prompt and history with the gate on the history."
    model, rows = tiny_model(kind), random_rows(range(64), seed=2)
    roles = torch.tensor([[0, 1, 2, 2, 1]])
    with rows.applied(model, roles=roles, read_by=[Role.TARGET]), torch.no_grad():
        out = model.generate(X[:1], attention_mask=torch.ones(1, 5, dtype=torch.long), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=63)
        greedy = model(out).logits.argmax(-1)
    assert torch.equal(greedy[0, 4:-1], out[0, 5:])


def test_roles_of_another_batch_are_refused():
    model, rows = tiny_model("llama"), random_rows()
    with pytest.raises(ValueError, match="pass the roles of this batch"), rows.applied(model, roles=torch.ones(2, 5, dtype=torch.long), read_by=[Role.SOURCE]):
        model(torch.ones(3, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="both roles"), rows.applied(model, read_by=[Role.SOURCE]):
        pass


def test_noise_keeps_the_norm_and_the_others():
    model = tiny_model("llama")
    rows = TunedRows([3, 7], TunedRows.of(model, [3, 7]).rows + torch.randn(2, 16))
    noise = rows.noise(model, seed=4)
    assert torch.allclose(noise.delta(model).norm(dim=1), rows.delta(model).norm(dim=1), rtol=1e-4)
    assert torch.equal(noise.rows, rows.noise(model, seed=4).rows) and not torch.equal(noise.rows, rows.noise(model, seed=5).rows)


def test_merging_on_a_tied_model_unties_the_copy_only():
    model = tiny_model("gpt2")
    head = model.get_output_embeddings().weight.clone()
    merged = random_rows().merged(model)
    assert torch.equal(merged.get_output_embeddings().weight, head) and not merged.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight and model.config.tie_word_embeddings


def test_what_is_refused():
    model = tiny_model("llama")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    odd = copy.deepcopy(model)
    odd.get_input_embeddings().forward = lambda ids: torch.nn.functional.embedding(ids, odd.get_input_embeddings().weight) + 1
    for call, words in (
        (lambda: input_embedding(t5), "encoder-decoder"),
        (lambda: input_embedding(odd), "more than look up"),
        (lambda: TunedRows([1, 1], torch.zeros(2, 16)), "1 distinct"),
        (lambda: TunedRows([1], torch.full((1, 16), torch.inf)), "infinity"),
        (lambda: TunedRows.of(model, [64]), "64"),
        (lambda: random_rows().restrict([4]), "4"),
        (lambda: random_rows(d=8).applied(model).__enter__(), "another model"),
        (lambda: random_rows(ids=(70,)).applied(model).__enter__(), "another model"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_sample_ids():
    assert sample_ids(range(100), 10, seed=1).tolist() == sample_ids(range(100), 10, seed=1).tolist() != sample_ids(range(100), 10, seed=2).tolist()
    assert len(set(sample_ids([5, 5, 6], 5).tolist())) == 2
