"""The loss at targets only is the model's own loss, its gradient the plain one; what it does not fit keeps its own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CohereConfig, CohereForCausalLM, MixtralConfig, MixtralForCausalLM

from conftest import ARCHITECTURES, examples, tiny_model
from kslottery.data import collate
from kslottery.rows import TunedRows
from kslottery.training import _frozen_head, _HeadLoss, _Learner, target_loss
from kslottery.tuning import active_ids


def loss_and_gradient(model, rows, batch, lean, count=None):
    learner = _Learner(model, rows)
    assert learner.lean
    learner.lean = lean
    rows.weight.grad = None
    with rows.applied(model):
        loss = learner(**batch, count=count)
        loss.backward()
    with torch.no_grad():  # the head is itself again
        assert model(input_ids=batch["input_ids"]).logits.shape == (*batch["input_ids"].shape, 64)
    return loss.detach(), rows.weight.grad.clone()


@pytest.mark.parametrize("count", [None, 500])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_same_loss_and_gradient(kind, count):
    model, data = tiny_model(kind, hidden=32).requires_grad_(False), examples()
    for p in model.parameters():
        p.mul_(4)  # logits that matter
    rows, batch = TunedRows.of(model, active_ids(data)), collate(data[:8], 0)
    plain, lean = (loss_and_gradient(model, rows, batch, way, count) for way in (False, True))
    assert torch.isclose(plain[0], lean[0], rtol=1e-5, atol=0)
    assert (plain[1] - lean[1]).abs().max() <= 1e-5 * plain[1].abs().max() > 0


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_add_up(chunk):
    torch.manual_seed(0)
    hidden, labels, weight = torch.randn(7, 8, requires_grad=True), torch.randint(0, 50, (7,)), torch.randn(50, 8)
    loss = _HeadLoss.apply(hidden, labels, weight, None, chunk)
    (3 * loss).backward()
    lean, hidden.grad = hidden.grad, None
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    (3 * expected).backward()
    assert torch.isclose(loss, expected, rtol=1e-6) and torch.allclose(lean, hidden.grad, rtol=1e-5, atol=1e-6)


def test_a_bias_is_read():
    torch.manual_seed(0)
    hidden, labels, head = (
        torch.randn(2, 5, 8, requires_grad=True),
        torch.randint(0, 20, (2, 5)),
        torch.nn.Linear(8, 20).requires_grad_(False),
    )
    expected = torch.nn.functional.cross_entropy(head(hidden[:, :-1]).reshape(-1, 20), labels[:, 1:].reshape(-1))
    assert torch.isclose(target_loss(hidden, labels, head), expected, rtol=1e-6)


def test_bf16_agrees_with_its_plain_path():
    "bf16 weights: logits are rounded to bf16 either way, the loss is summed in fp32."
    model, data = tiny_model("llama", hidden=32).bfloat16().requires_grad_(False), examples()
    rows, batch = TunedRows.of(model, active_ids(data)), collate(data[:8], 0)
    plain, lean = (loss_and_gradient(model, rows, batch, way) for way in (False, True))
    assert lean[0].dtype == torch.float32 and torch.isclose(plain[0].float(), lean[0], rtol=1e-5)
    assert (plain[1] - lean[1]).norm() < 2e-2 * plain[1].norm()  # bf16 has 8 bits


def test_what_keeps_its_own_loss():
    shape = dict(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    scaled = CohereForCausalLM(CohereConfig(**shape, logit_scale=0.5)).requires_grad_(False)
    experts = MixtralForCausalLM(MixtralConfig(**shape, output_router_logits=True)).requires_grad_(False)
    capped = tiny_model("gemma").requires_grad_(False)
    assert _frozen_head(capped) is not None
    capped.config.final_logit_softcapping = 30.0
    learning = tiny_model("llama")
    tied = tiny_model("gpt2").requires_grad_(False)
    tied.get_input_embeddings().weight.requires_grad_(True)  # a dense embedding that is the head too
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for model in (scaled, experts, capped, learning, tied, adapted):
        assert _frozen_head(model) is None, type(model)
