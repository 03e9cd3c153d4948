"""Many tickets in one batch: each request gets the text of its own merged model, on every architecture."""

import pytest
import torch

from conftest import ARCHITECTURES, TIED, talker, tiny_model
from kslottery.data import Role
from kslottery.rows import TunedRows
from kslottery.ticket import TicketBank
from test_ticket import TOKENIZER, bare, merged, ticket_for

EOS = 63
SETTINGS = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=EOS)


def drawn(model, n, mode="input_only", k=6, seed=0):
    "n tickets of k rows each; their ids overlap, their rows do not."
    generator, V = torch.Generator().manual_seed(seed), len(model.get_input_embeddings().weight)
    ids = [torch.randperm(V, generator=generator)[:k] for _ in range(n)]
    spread = model.get_input_embeddings().weight.std() * 3
    own = [TunedRows.of(model, i, mode) for i in ids]
    return {
        f"{mode}{j}": TunedRows(
            rows.ids, rows.weight + spread * torch.randn(rows.weight.shape, generator=generator), mode
        )
        for j, rows in enumerate(own)
    }


def padded(n, seed=1):
    "n prompts of 4 to 9 tokens, padded on the left: ids and mask."
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 10, (n,), generator=generator)
    mask = (torch.arange(9) >= 9 - lengths[:, None]).long()
    return torch.randint(3, EOS, (n, 9), generator=generator) * mask, mask


def texts(model, prompts, mask, beams=1):
    out = model.generate(prompts, attention_mask=mask, num_beams=beams, **SETTINGS)[:, prompts.shape[1] :].tolist()
    return [new[: new.index(EOS)] if EOS in new else new for new in out]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_32_mixed_requests_are_32_merged_models(kind, beams):
    """In one batch: 30 tickets (of both modes where the model is tied) and the plain model.

    Each request's text is what its merged model gives alone, in the same padding.
    """
    model = talker(kind)
    bank = TicketBank(
        model, drawn(model, 15) | drawn(model, 15, "shared" if kind in TIED else "input_only", k=4, seed=2)
    )
    names = [*bank.rows, None, None]
    names = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(3))]
    prompts, mask = padded(len(names))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with bank.applied(names):
        mixed = texts(model, prompts, mask, beams)
    plain = texts(model, prompts, mask, beams)
    for n, name in enumerate(names):
        own = merged(bank.rows[name], model) if name else model
        assert texts(own, prompts[n : n + 1], mask[n : n + 1], beams)[0] == mixed[n], name
    assert sum(a != b for a, b in zip(mixed, plain)) > len(names) / 3  # the tickets matter
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model.get_input_embeddings()._forward_hooks and not model.get_output_embeddings()._forward_hooks


def test_beam_search_repeats_the_choice():
    """Known trouble: PEFT's mixed batches fell apart under beam search (issue 2283).

    It makes more sequences than there are adapter names.

    Two requests, one prompt, different tickets: were the choice repeated in the wrong order, they would mix.
    """
    model = talker("llama")
    bank = TicketBank(model, drawn(model, 2, k=40))
    prompts, mask = (x[:1].repeat(2, 1) for x in padded(1))
    a, b = bank.rows
    for names in ([a, b], [b, a], [a, None]):
        with bank.applied(names):
            got = texts(model, prompts, mask, beams=4)
        assert (
            got
            == [texts(merged(bank.rows[n], model) if n else model, prompts[:1], mask[:1], beams=4)[0] for n in names]
            and got[0] != got[1]
        )


def test_one_name_for_all_is_that_ticket_and_none_is_the_base():
    model, (prompts, mask) = tiny_model("gpt2"), padded(3)
    bank = TicketBank(model, drawn(model, 1) | drawn(model, 1, "shared"))
    with torch.no_grad():
        for name, rows in bank.rows.items():
            with bank.applied([name] * 3):
                all_alike = model(prompts, attention_mask=mask).logits
            with rows.applied(model):
                torch.testing.assert_close(all_alike, model(prompts, attention_mask=mask).logits)
        plain = model(prompts, attention_mask=mask).logits
        with bank.applied([None] * 3):
            assert torch.equal(model(prompts, attention_mask=mask).logits, plain)


def test_a_gate_holds_for_every_ticket():
    model = tiny_model("llama")
    bank = TicketBank(model, drawn(model, 2, k=64))
    prompts, roles = torch.randint(3, 60, (3, 5)), torch.tensor([[0, 1, 2, 2, 1]] * 3)
    a, b = bank.rows
    embedding = model.get_input_embeddings()
    with torch.no_grad(), bank.applied([a, None, b], roles, [Role.SOURCE]):
        read = embedding(prompts)
    for n, name in enumerate((a, None, b)):
        expected = embedding.weight[prompts[n]].detach().clone()
        if name:
            expected[roles[n] == Role.SOURCE] = bank.rows[name].weight[prompts[n][roles[n] == Role.SOURCE]].detach()
        assert torch.equal(read[n], expected)


def test_a_ticket_costs_k_by_d():
    "32 tickets over a wide vocabulary: what the bank holds, and what a batch adds while it runs, does not know V."
    model = tiny_model("llama", vocabulary=50_000)
    bank = TicketBank(model, drawn(model, 32, k=4))
    held = sum(x.numel() for rows in bank.rows.values() for x in (*rows.parameters(), *rows.buffers()))
    assert held == 32 * (4 * 16 + 4)
    with bank.applied(list(bank.rows)):
        hook = next(iter(model.get_input_embeddings()._forward_hooks.values()))
        kept = [x for x in hook.args if isinstance(x, torch.Tensor)]
        assert 0 < sum(x.numel() for x in kept) <= held + 32 * 4


def test_folders_and_what_is_refused(tmp_path):
    model = tiny_model("llama")
    for name, ids in (("a", (9, 4)), ("b", (4, 5))):
        ticket_for(model, ids).save(tmp_path / name)
    bare(model, [4]).save(tmp_path / "bare")
    ticket_for(tiny_model("llama", seed=1)).save(tmp_path / "foreign")
    (tmp_path / "x").mkdir()
    ticket_for(model).save(tmp_path / "x" / "a")
    bank = TicketBank.load(model, TOKENIZER, [tmp_path / "a", tmp_path / "b"])
    assert len(bank.rows) == 2 and bank.rows["b"].ids.tolist() == [4, 5]
    with bank.applied(["a", "b"]), pytest.raises(ValueError, match="3 sequences for a batch of 2"):
        model(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="overwrite"), bank.rows["a"].applied(model), bank.applied(["b"]):
        pass
    load = lambda *names: TicketBank.load(model, TOKENIZER, [tmp_path / n for n in names])
    for call, words in (
        (lambda: bank.applied(["catalan"]), "'catalan'.*a, b"),
        (lambda: load("a", "x/a"), "name of another"),
        (lambda: load("bare"), "no tuned rows"),
        (lambda: load("foreign"), "another embedding"),
        (lambda: TicketBank(model, {"far": TunedRows([70], torch.ones(1, 16))}), "70.*64 x 16"),
        (lambda: TicketBank(model, {"tied": TunedRows([7], torch.ones(1, 16), "shared")}), "does not tie"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_all_sides_in_one_batch(beams):
    "An untied model: tickets of the input, of the head, of both, and the plain model; each as its merged model."
    model = talker("llama")
    modes = ("input_only", "head", "both")
    bank = TicketBank(model, {name: rows for mode in modes for name, rows in drawn(model, 4, mode, k=20).items()})
    names = [*bank.rows, None, None]
    prompts, mask = padded(len(names))
    with bank.applied(names):
        mixed = texts(model, prompts, mask, beams)
    plain = texts(model, prompts, mask, beams)
    for n, name in enumerate(names):
        own = merged(bank.rows[name], model) if name else model
        assert texts(own, prompts[n : n + 1], mask[n : n + 1], beams)[0] == mixed[n], name
    assert all(sum(mixed[i] != plain[i] for i in range(4 * j, 4 * j + 4)) for j in range(3))  # of each mode some matter
    with (
        pytest.raises(ValueError, match="also score tokens"),
        bank.applied(names, torch.ones_like(prompts), [Role.SOURCE]),
    ):
        pass
    assert not model.get_output_embeddings()._forward_hooks and not model.get_input_embeddings()._forward_hooks
