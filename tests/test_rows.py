"""The row mechanism on every architecture: what it reads, what it leaves alone, and who may read it."""

import copy
import resource
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from conftest import ARCHITECTURES, TIED, talker, tiny_model
from kslottery.data import Example, Role, collate
from kslottery.rows import MODES, TunedRows, add_tokens, input_embedding, is_tied, sample_ids

X = torch.tensor([[1, 7, 9, 7, 5], [3, 9, 9, 3, 7]])
GREEDY = dict(attention_mask=torch.ones_like(X), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=63)


def random_rows(ids=(3, 7, 9), d=16, seed=0, mode="input_only"):
    return TunedRows(ids, torch.randn(len(ids), d, generator=torch.Generator().manual_seed(seed)), mode)


def merged(rows, model):
    "A copy of the model with the rows written into it."
    return rows.write(copy.deepcopy(model))


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
        written = merged(rows, model)
        assert torch.equal(read, written(X).logits) and not torch.equal(read, plain)
        assert torch.equal(model(X).logits, plain)
    after = state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not model.get_input_embeddings()._forward_hooks
    base, changed = (m.get_input_embeddings().weight for m in (model, written))
    assert torch.equal(changed[[3, 7, 9]], rows.weight.to(dtype))
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
    assert (rows.weight.grad.abs().sum(1) > 0).all() and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("beams", [1, 4])
def test_gates_open_and_shut_in_generation(model, beams):
    rows = random_rows(range(64), seed=1)
    roles = torch.tensor([[0, 1, 2, 2, 1], [0, 0, 1, 2, 1]])
    settings = dict(
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]),
        max_new_tokens=6,
        num_beams=beams,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=63,
    )
    plain, changed = (m.generate(X, **settings) for m in (model, merged(rows, model)))
    for cache in (True, False):
        for gate, expected in ((list(Role), changed), ([], plain)):
            with rows.applied(model, roles=roles, read_by=gate):
                assert torch.equal(model.generate(X, use_cache=cache, **settings), expected)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_history_gate_reads_each_generated_token(kind):
    """Rows read by the target only.

    Generation under the cache equals a whole pass over prompt and history with the gate on the history.
    """
    model, rows = tiny_model(kind), random_rows(range(64), seed=2)
    roles = torch.tensor([[0, 1, 2, 2, 1]])
    with rows.applied(model, roles=roles, read_by=[Role.TARGET]), torch.no_grad():
        out = model.generate(
            X[:1],
            attention_mask=torch.ones(1, 5, dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=63,
        )
        greedy = model(out).logits.argmax(-1)
    assert torch.equal(greedy[0, 4:-1], out[0, 5:])


def test_roles_of_another_batch_are_refused():
    model, rows = tiny_model("llama"), random_rows()
    with (
        pytest.raises(ValueError, match="pass the roles of this batch"),
        rows.applied(model, roles=torch.ones(2, 5, dtype=torch.long), read_by=[Role.SOURCE]),
    ):
        model(torch.ones(3, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="both roles"), rows.applied(model, read_by=[Role.SOURCE]):
        pass


def test_noise_keeps_the_norm_and_the_others():
    model = tiny_model("llama")
    rows = TunedRows([3, 7], TunedRows.of(model, [3, 7]).weight + torch.randn(2, 16))
    noise = rows.noise(model, seed=4)
    assert torch.allclose(noise.delta(model).norm(dim=1), rows.delta(model).norm(dim=1), rtol=1e-4)
    assert torch.equal(noise.weight, rows.noise(model, seed=4).weight) and not torch.equal(
        noise.weight, rows.noise(model, seed=5).weight
    )


def test_merging_on_a_tied_model_unties_the_copy_only():
    model = tiny_model("gpt2")
    head = model.get_output_embeddings().weight.clone()
    written = merged(random_rows(), model)
    assert torch.equal(written.get_output_embeddings().weight, head) and not written.config.tie_word_embeddings
    assert (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight and model.config.tie_word_embeddings
    )


@pytest.mark.parametrize("mode", ["input_only", "shared"])
@pytest.mark.parametrize("kind", TIED)
def test_the_two_modes_of_a_tied_model(kind, mode, tmp_path):
    """The mode says whether the output follows the rows, in reading, in merging and in what is stored.

    Known trouble: PEFT changed the input only, then the input and the output, of tied models (PR 2399), still treats
    the tie differently from case to case (issue 2864), and merging an adapter into one of two tied matrices leaves it
    in both or in none (PR 2972).
    """
    model, rows = talker(kind), random_rows(mode=mode)
    base, head = state(model), model.get_output_embeddings().weight.clone()
    with torch.no_grad():
        written = merged(rows, model)
        with rows.applied(model):
            read, texts = model(X).logits, [model.generate(X, num_beams=b, **GREEDY) for b in (1, 3)]
        torch.testing.assert_close(read, written(X).logits)
        assert all(torch.equal(a, written.generate(X, num_beams=b, **GREEDY)) for a, b in zip(texts, (1, 3)))
    assert not torch.equal(texts[0], model.generate(X, **GREEDY))
    after = state(model)
    assert (
        all(torch.equal(base[k], after[k]) for k in base)
        and is_tied(model)
        and not model.get_output_embeddings()._forward_hooks
    )
    written.save_pretrained(tmp_path)
    for copy_ in (written, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert is_tied(copy_) == copy_.config.tie_word_embeddings == (mode == "shared")
        assert torch.equal(
            copy_.get_output_embeddings().weight, copy_.get_input_embeddings().weight if mode == "shared" else head
        )
        assert torch.equal(copy_.get_input_embeddings().weight[[3, 7, 9]], rows.weight) and torch.equal(
            copy_(X).logits, written(X).logits
        )


@pytest.mark.parametrize("kind", TIED)
def test_shared_rows_learn_from_both_places(kind):
    """Their gradient is that of the whole tied matrix; an optimiser's step on them is the step on the matrix.

    The input alone has another gradient.
    """
    model, whole, target = tiny_model(kind).requires_grad_(False), tiny_model(kind), X.roll(-1, dims=1)
    loss = lambda m: torch.nn.functional.cross_entropy(m(X).logits.flatten(0, 1), target.flatten())
    loss(whole).backward()
    expected = whole.get_input_embeddings().weight.grad[[3, 7, 9]]
    gradients = {}
    for mode in ("shared", "input_only"):
        rows = TunedRows.of(model, [3, 7, 9], mode)
        with rows.applied(model):
            loss(model).backward()
        gradients[mode] = rows.weight.grad
    torch.testing.assert_close(gradients["shared"], expected)
    assert not torch.allclose(gradients["input_only"], expected, rtol=0.1)
    assert all(p.grad is None for p in model.parameters())


def test_an_untied_model_stays_untied():
    """The weights decide, not a flag.

    Known trouble: PEFT ties by the method's argument, whatever the model's configuration says (issue 2944).
    """
    untied = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    ).eval()
    flagged = tiny_model("llama")
    flagged.config.tie_word_embeddings = True  # a flag that is wrong
    for model in (untied, flagged):
        head = model.get_output_embeddings().weight.clone()
        written = merged(random_rows(), model)
        assert not is_tied(model) and not is_tied(written)
        assert torch.equal(written.get_output_embeddings().weight, head)
        for use in (
            lambda m: merged(random_rows(mode="shared"), m),
            lambda m: random_rows(mode="shared").applied(m).__enter__(),
        ):
            with pytest.raises(ValueError, match="does not tie.*input_only"):
                use(model)


def test_scaled_embeddings_scale_the_rows_too():
    """Gemma multiplies each row by sqrt(d), and ours too.

    Known trouble: PEFT's trainable tokens left out this factor (issue 2809): tuned rows were read at a quarter of their
    size here.
    """
    model, rows = tiny_model("gemma"), random_rows()
    with rows.applied(model), torch.no_grad():
        read = model.get_input_embeddings()(X)
    assert torch.equal(read[0, 1], rows.weight[1] * 4) and torch.equal(rows.weight, random_rows().weight)


def test_rows_beyond_the_tokenizer():
    """Embeddings are padded to round sizes, and resized: an id is valid up to the embedding's last row, and not beyond.

    Known trouble: PEFT takes the tokenizer's length for the embedding's and cuts it (issue 2415).
    """
    model, rows = tiny_model("qwen2", vocabulary=80), random_rows([9, 79])
    x = torch.tensor([[1, 79, 9]])
    with torch.no_grad():
        with rows.applied(model):
            assert torch.equal(model(x).logits, merged(rows, model)(x).logits)
        model.resize_token_embeddings(96, mean_resizing=False)
        for tuned, ids in ((rows, x), (random_rows([9, 95]), x + 16)):
            with tuned.applied(model):
                assert torch.equal(model(ids).logits, merged(tuned, model)(ids).logits)
    with pytest.raises(ValueError, match="96"):
        TunedRows.of(model, [96])


def test_padding_with_eos_still_teaches_to_stop():
    """With pad = eos, each sentence's own EOS has a label and the padding none, and the rows learn to stop.

    Known trouble: collators that mask every padding id mask the EOS too, and the model never stops
    (mlabonne/llm-course issue 33; huggingface/trl PR 3091).
    """
    eos, model = 2, tiny_model("llama").requires_grad_(False)
    data = [
        Example("a", [1, 5, 7, eos], [-100, -100, 7, eos], [1] * 4, 2),
        Example("b", [1, 6, 9, 11, 13, eos], [-100, -100, 9, 11, 13, eos], [1] * 6, 2),
    ]
    batch = collate(data, eos)
    assert batch["input_ids"].shape == (2, 6) and batch["input_ids"][0, 4:].tolist() == [eos, eos]  # the padding
    assert (batch["labels"] == eos).sum(1).tolist() == [1, 1] and batch["labels"][0, 4:].tolist() == [-100, -100]
    rows = TunedRows.of(model, [5, 6, 7, 9, 11, 13])
    optimizer = torch.optim.AdamW(rows.parameters(), lr=0.1, weight_decay=0)
    with rows.applied(model):
        for _ in range(60):
            optimizer.zero_grad()
            model(**{k: v for k, v in batch.items() if k != "roles"}).loss.backward()
            optimizer.step()
        out = [
            model.generate(
                torch.tensor([[1, i]]), max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=eos
            )[0, 2:].tolist()
            for i in (5, 6)
        ]
    assert out == [[7, eos], [9, 11, 13, eos]]


def test_weight_decay_reaches_the_tuned_rows_only():
    """No optimiser can see the other rows.

    Known trouble: a dense embedding with masked gradients still decays everywhere (diffusers issues 1009 and 1176).
    """
    decayed = {}
    for way in ("rows", "masked"):
        model = tiny_model("llama").requires_grad_(False)
        weight, rows = model.get_input_embeddings().weight, TunedRows.of(model, [3, 7, 9])
        before, tuned = weight.clone(), [rows.weight] if way == "rows" else [weight.requires_grad_(True)]
        if way == "masked":
            mask = torch.zeros(64, 1)
            mask[[3, 7, 9]] = 1
            weight.register_hook(lambda g, mask=mask: g * mask)
        optimizer = torch.optim.AdamW(tuned, lr=1e-2, weight_decay=0.1)
        with rows.applied(model) if way == "rows" else torch.enable_grad():
            for _ in range(3):
                model(X, labels=X).loss.backward()
                optimizer.step()
        result = merged(rows, model).get_input_embeddings().weight if way == "rows" else weight
        decayed[way] = (result != before).any(1).nonzero().flatten().tolist()
    assert decayed == {
        "rows": [3, 7, 9],
        "masked": list(range(1, 64)),
    }  # row 0, the padding's, is zero and cannot decay


def test_two_tickets_never_overwrite_each_other(model):
    "Known trouble: PEFT merged one adapter after another over shared token ids without a word (issue 3510)."
    rows, clash, apart = random_rows(), random_rows([9, 11], seed=1), random_rows([11, 13], seed=1)
    with rows.applied(model):
        with pytest.raises(ValueError, match="token id 9.*overwrite"), clash.applied(model):
            pass
        with apart.applied(model), torch.no_grad():
            both = model(X + 4).logits
    assert not model.get_input_embeddings()._forward_hooks
    assert rows.conflicts(clash).tolist() == [9]
    with pytest.raises(ValueError, match=r"\[9\]"):
        rows.union(clash)
    with rows.union(apart).applied(model), torch.no_grad():
        assert torch.equal(model(X + 4).logits, both)


def test_arithmetic_is_that_of_the_merged_models():
    model, a, b = tiny_model("llama"), random_rows(), random_rows([9, 11], seed=1)
    base, first, second = (m.get_input_embeddings().weight for m in (model, merged(a, model), merged(b, model)))
    for w in (0.0, 0.3, 1.0, 1.5):
        torch.testing.assert_close(
            merged(a.interpolate(b, model, w), model).get_input_embeddings().weight, (1 - w) * first + w * second
        )
        torch.testing.assert_close(
            merged(a.scale(model, w), model).get_input_embeddings().weight, base + w * (first - base)
        )
    assert torch.equal(a.scale(model, 1).weight, a.weight) and torch.equal(
        a.scale(model, 0).weight, TunedRows.of(model, a.ids).weight
    )
    same = TunedRows([9, 11], torch.stack([a.weight[2].detach(), b.weight[1].detach()]))
    assert (
        not len(a.conflicts(same))
        and a.union(same).ids.tolist() == [3, 7, 9, 11]
        and torch.equal(a.union(same).weight[:3], a.weight)
    )
    assert random_rows(mode="shared").restrict([3]).mode == "shared"
    for combine in (lambda x: x.union(a), lambda x: x.interpolate(a, model)):
        with pytest.raises(ValueError, match="shared.*input_only"):
            combine(random_rows([1], mode="shared"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrix_is_the_merged_matrix(model, dtype):
    "Slice by slice, in fp32: the tuned rows as they are, not rounded to the model's dtype."
    model, rows = model.to(dtype), random_rows()
    view, weight = rows.matrix(model), model.get_input_embeddings().weight
    expected = weight.detach().float()
    expected[[3, 7, 9]] = rows.weight.detach()
    assert view.base is weight and view.shape == weight.shape == (len(view), 16)
    assert view.dtype == torch.float32 and view.device == weight.device
    for part in (
        slice(None),
        slice(2, 8),
        slice(60, 99),
        slice(1, 20, 3),
        np.array([9, 0, 3]),
        torch.tensor([7, 7]),
        [],
    ):
        assert torch.equal(view[part], expected[part]) and not view[part].requires_grad
    view[0:10].zero_()  # a copy: the model is as it was
    assert torch.equal(view[:], expected) and torch.equal(
        weight[[3, 7, 9]], TunedRows.of(model, [3, 7, 9]).weight.to(dtype)
    )
    assert torch.equal(expected.to(dtype), merged(rows, model).get_input_embeddings().weight)
    with pytest.raises(ValueError, match="another model"):
        random_rows(d=8).matrix(model)


def test_the_matrix_copies_nothing():
    "A view of a matrix of 128 MB, scanned in slices, takes no second matrix."
    model = torch.nn.Module()
    model.config, embedding = None, torch.nn.Embedding(250_000, 128)
    model.get_input_embeddings = model.get_output_embeddings = lambda: embedding
    view = random_rows(d=128).matrix(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    embedding.requires_grad_(False)
    total = sum(float(view[i : i + 4096].sum()) for i in range(0, len(view), 4096))
    assert abs(total - float(embedding.weight.sum() + (view[[3, 7, 9]] - embedding.weight[[3, 7, 9]]).sum())) < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize("mode", ["input_only", "shared"])
@pytest.mark.parametrize("kind", TIED)
def test_no_rows_are_rows_too(kind, mode):
    "An empty ticket is a value: it is read, generated with, written, united and viewed."
    model = talker(kind)
    none = TunedRows.of(model, [], mode)
    before = state(model)
    with torch.no_grad():
        plain = model(X).logits
        texts = model.generate(X, **GREEDY)
        with none.applied(model):
            assert torch.equal(model(X).logits, plain) and torch.equal(model.generate(X, **GREEDY), texts)
            assert not model.get_input_embeddings()._forward_hooks
    if mode == "input_only":
        with none.applied(model, roles=torch.ones_like(X), read_by=[Role.SOURCE]):
            assert torch.equal(model.generate(X, **GREEDY), texts)
    assert torch.equal(none.matrix(model)[:], model.get_input_embeddings().weight) and none.matrix(model)[[]].shape == (
        0,
        16,
    )
    some = random_rows(mode=mode)
    assert none.union(some).fingerprint() == some.union(none).fingerprint() == some.fingerprint() != none.fingerprint()
    assert (
        len(none.noise(model))
        == len(none.scale(model, 2.0))
        == len(none.conflicts(some))
        == len(none.restrict([]))
        == 0
    )
    assert torch.equal(merged(none, model)(X).logits, plain) and all(
        torch.equal(before[k], v) for k, v in state(model).items()
    )


def test_rows_say_what_they_are():
    assert repr(random_rows()) == "TunedRows(3 rows of 16 numbers, input_only; ids: 3, 7, 9)"
    assert repr(random_rows(range(9), mode="shared")).endswith("shared; ids: 0, 1, 2, 3, 4, 5, 6, 7, ...)")
    assert repr(random_rows(())).startswith("TunedRows(0 rows of 16 numbers") and repr(random_rows(())).endswith(
        "ids: none)"
    )


def test_blocks_may_end_in_any_order():
    "What a block noted about its rows goes with it, whichever ends first."
    model = tiny_model("llama")
    first, second = random_rows().applied(model), random_rows([11]).applied(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    with random_rows().union(random_rows([11])).applied(model):
        pass


def test_int32_ids_are_read():
    model, rows = tiny_model("llama"), random_rows()
    with rows.applied(model), torch.no_grad():
        assert torch.equal(model(X.int()).logits, model(X).logits)


def test_what_is_refused():
    model = tiny_model("llama")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    m2m = M2M100ForConditionalGeneration(
        M2M100Config(
            vocab_size=32,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
        )
    )
    odd = copy.deepcopy(model)
    odd.get_input_embeddings().forward = lambda ids: (
        torch.nn.functional.embedding(ids, odd.get_input_embeddings().weight) + 1
    )
    for call, words in (
        (lambda: input_embedding(t5), "T5.*encoder-decoder.*causal LM"),
        (lambda: TunedRows.of(m2m, [3]), "M2M100.*encoder-decoder.*causal LM"),
        (lambda: TunedRows([1], torch.zeros(1, 16), "output"), "'output'.*input_only, shared, head, both"),
        (
            lambda: (
                random_rows(mode="shared")
                .applied(tiny_model("gpt2"), roles=torch.ones_like(X), read_by=[Role.SOURCE])
                .__enter__()
            ),
            "gate input_only",
        ),
        (lambda: input_embedding(odd), "more than look up"),
        (lambda: TunedRows([1, 1], torch.zeros(2, 16)), "1 distinct"),
        (lambda: TunedRows([1], torch.full((1, 16), torch.inf)), "infinity"),
        (lambda: TunedRows.of(model, [64]), "64"),
        (lambda: TunedRows.of(model, [-1]), "-1"),
        (lambda: random_rows().restrict([4]), "4"),
        (lambda: random_rows(d=8).applied(model).__enter__(), "another model"),
        (lambda: random_rows(ids=(70,)).applied(model).__enter__(), "another model"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# Rows of the output

UNTIED = ("llama", "qwen2", "mistral")


def apart(mode, model, seed=0):
    "Random rows of three ids, of mode head or both."
    return random_rows(d=16 * (1 + (mode == "both")), seed=seed, mode=mode)


def biased(kind="llama"):
    "A model whose head has a bias."
    model = talker(kind)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(5)))
    return model


def softcapped():
    "An untied Gemma 2: its embedding is scaled, its logits are capped after the head."
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = Gemma2Config(**shape, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False)
    config.final_logit_softcapping = 0.05
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["head", "both"])
@pytest.mark.parametrize("make", [*(partial(talker, kind) for kind in UNTIED), biased, softcapped])
def test_rows_of_the_output_are_a_head_that_was_written(make, mode, dtype):
    "In reading, in merging, in greedy and beam text; by hand, row by row; and nothing is left behind."
    model = make().to(dtype)
    rows, before = apart(mode, model), state(model)
    hand = copy.deepcopy(model)
    with torch.no_grad():
        for table, part in ((hand.get_input_embeddings(), rows.input), (hand.get_output_embeddings(), rows.output)):
            if part is not None:
                table.weight[[3, 7, 9]] = part.to(dtype)
        with rows.applied(model):
            read, texts = model(X).logits, [model.generate(X, num_beams=b, **GREEDY) for b in (1, 3)]
        expected, written = hand(X).logits, merged(rows, model)
        torch.testing.assert_close(read, expected)
        assert torch.equal(written(X).logits, expected) and not torch.equal(model(X).logits, expected)
        if dtype == torch.float32:
            assert all(torch.equal(a, hand.generate(X, num_beams=b, **GREEDY)) for a, b in zip(texts, (1, 3)))
        changed = [name for name, value in state(written).items() if not torch.equal(value, before[name])]
        assert len(changed) == 1 + (mode == "both") and not is_tied(written)
    assert all(torch.equal(before[k], v) for k, v in state(model).items())
    assert not model.get_output_embeddings()._forward_hooks and not model.get_input_embeddings()._forward_hooks
    own = TunedRows.of(model, range(64), mode)
    with torch.no_grad(), own.applied(model):
        torch.testing.assert_close(model(X).logits, make().to(dtype)(X).logits)


def test_only_what_belongs_to_an_id_is_exchanged():
    "Head rows leave what is read, and the scores of the other ids, as they were, bit for bit."
    model, rows = talker("llama"), random_rows(mode="head")
    with torch.no_grad():
        plain, read = model(X, output_hidden_states=True), model.get_input_embeddings()(X)
        with rows.applied(model):
            tuned = model(X, output_hidden_states=True)
            assert torch.equal(model.get_input_embeddings()(X), read)
    others = np.setdiff1d(np.arange(64), [3, 7, 9])
    assert torch.equal(tuned.logits[..., others], plain.logits[..., others])
    torch.testing.assert_close(tuned.logits[..., [3, 7, 9]], tuned.hidden_states[-1] @ rows.output.T)


@pytest.mark.parametrize("make", [partial(tiny_model, "llama"), biased])
@pytest.mark.parametrize("mode", ["head", "both"])
def test_rows_of_the_output_have_the_gradients_of_dense_training(make, mode):
    model, whole, target = make().requires_grad_(False), make(), X.roll(-1, dims=1)
    loss = lambda m: torch.nn.functional.cross_entropy(m(X).logits.flatten(0, 1), target.flatten())
    loss(whole).backward()
    tables = [whole.get_input_embeddings(), whole.get_output_embeddings()][mode == "head" :]
    rows = TunedRows.of(model, [3, 7, 9], mode)
    with rows.applied(model):
        for n in (1, 2):  # a second pass within one block adds up
            loss(model).backward()
            expected = torch.cat([n * table.weight.grad[[3, 7, 9]] for table in tables], 1)
            torch.testing.assert_close(rows.weight.grad, expected, rtol=1e-4, atol=1e-6)
    assert (rows.weight.grad.abs().sum(1) > 0).all() and all(p.grad is None for p in model.parameters())


def test_blocks_of_the_output_never_overwrite_each_other():
    "A row of the input and one of the output are two rows: they may meet. Two of the output may not."
    model = talker("llama")
    read, scored, pair = random_rows(), random_rows(seed=1, mode="head"), apart("both", model)
    together = TunedRows([3, 7, 9], torch.cat([read.weight, scored.weight], 1), "both")
    with torch.no_grad():
        with together.applied(model):
            expected = model(X).logits
        with scored.applied(model), read.applied(model):
            assert torch.equal(model(X).logits, expected)
    for outer, inner in ((scored, scored), (scored, pair), (pair, scored), (pair, read), (read, pair)):
        with (
            outer.applied(model),
            pytest.raises(ValueError, match="token id 3.*overwrite"),
            inner.restrict([3]).applied(model),
        ):
            pass
    other = random_rows([11], mode="head")
    with scored.applied(model), other.applied(model), torch.no_grad():
        both = model(X).logits
    with scored.union(other).applied(model), torch.no_grad():
        torch.testing.assert_close(model(X).logits, both)
    assert not model.get_output_embeddings()._forward_hooks and not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("mode", ["head", "both"])
def test_arithmetic_does_not_know_about_sides(mode, tmp_path):
    model = tiny_model("llama")
    rows, other = apart(mode, model), random_rows([9, 11], d=16 * (1 + (mode == "both")), seed=1, mode=mode)
    for w in (0.0, 0.3, 1.5):
        between, ends = merged(rows.interpolate(other, model, w), model), [merged(r, model) for r in (rows, other)]
        for table in ("get_input_embeddings", "get_output_embeddings"):
            first, second = (getattr(end, table)().weight for end in ends)
            torch.testing.assert_close(getattr(between, table)().weight, (1 - w) * first + w * second)
    assert torch.equal(rows.scale(model, 1).weight, rows.weight)
    torch.testing.assert_close(rows.scale(model, 2).delta(model), 2 * rows.delta(model), rtol=1e-4, atol=1e-5)
    noise = rows.noise(model)
    for part in slice(0, 16), slice(-16, None):  # each side moves as far as it did
        lengths = [r.delta(model)[:, part].norm(dim=1) for r in (rows, noise)]
        torch.testing.assert_close(*lengths, rtol=1e-4, atol=1e-5)
    assert rows.restrict([7]).mode == mode and rows.d == 16
    assert len({TunedRows([3], torch.ones(1, 32), m).fingerprint() for m in MODES}) == 4
    side = (model.get_input_embeddings if mode == "both" else model.get_output_embeddings)().weight
    view = rows.matrix(model)
    assert view.base is side and view.shape == (64, 16)
    assert torch.equal(view[[3, 4]], torch.stack([rows.weight[0, :16], side[4]]))
    none = TunedRows.of(model, [], mode)
    assert torch.equal(none.matrix(model)[:], side) and len(none.noise(model)) == 0 and none.d == 16
    with none.applied(model), torch.no_grad():
        assert torch.equal(model(X).logits, tiny_model("llama")(X).logits)


def test_a_mode_that_the_model_has_no_place_for():
    untied, tied, roles = tiny_model("llama"), tiny_model("gpt2"), dict(roles=torch.ones_like(X), read_by=[1])
    odd, narrow = tiny_model("llama"), tiny_model("llama")
    odd.lm_head = torch.nn.Sequential(odd.lm_head)
    odd.get_output_embeddings = lambda: odd.lm_head
    narrow.lm_head = torch.nn.Linear(8, 64, bias=False)
    short = tiny_model("llama")
    short.lm_head = torch.nn.Linear(16, 9, bias=False)
    for call, words in (
        (lambda: TunedRows.of(tied, [3], "both"), "mode both.*GPT2.*ties the two: use mode shared"),
        (lambda: apart("head", tied).write(tied), "mode head.*use mode shared"),
        (lambda: apart("both", tied).applied(tied).__enter__(), "mode both.*use mode shared"),
        (lambda: TunedRows.of(odd, [3], "head"), "linear output of 16.*Sequential: use mode input_only"),
        (lambda: TunedRows.of(narrow, [3], "both"), "linear output of 16"),
        (lambda: TunedRows.of(short, [9], "head"), "token id 9 is outside the embedding of 9 rows"),
        (lambda: apart("head", short).applied(short).__enter__(), "9 x 16"),
        (lambda: TunedRows([3], torch.ones(1, 15), "both"), "15 numbers cannot be an input and an output row"),
        (lambda: random_rows(mode="both").applied(untied).__enter__(), "rows of 8 numbers.*64 x 16"),
        (lambda: apart("head", untied).applied(untied, **roles).__enter__(), "head rows also score"),
        (lambda: apart("both", untied).applied(untied, **roles).__enter__(), "gate input_only"),
        (lambda: apart("head", untied).union(random_rows()), "head.*input_only"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert not untied.get_input_embeddings()._forward_hooks


# New tokens

NEW = ["<|im_end|>", "<|im_start|>"]


def vocabulary(n=60):
    "A tokenizer of n tokens, fewer than the rows of a tiny model."
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(n)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [60, 63, 64])
def test_new_tokens_begin_at_the_mean_row(model, n, dtype):
    "Of the vocabulary, spare rows left out: in spare rows, in one and a new one, in two new ones; the rest stays."
    model, words = model.to(dtype), vocabulary(n)
    before, tied = state(model), is_tied(model)
    with torch.no_grad():
        plain = model(X).logits[..., :n]
        assert add_tokens(model, words, NEW) == [n, n + 1]
        assert torch.equal(model(X).logits[..., :n], plain)
    size = max(64, n + 2)
    assert model.config.vocab_size == size and is_tied(model) == tied
    tables, kept = (model.get_input_embeddings(), model.get_output_embeddings()), [*range(n), *range(n + 2, 64)]
    grown = [name for name, module in model.named_modules() if module in tables]
    for name, value in state(model).items():
        rows = name.rsplit(".", 1)[0] in grown
        assert (
            torch.equal(value[kept], before[name][kept]) and len(value) == size
            if rows
            else torch.equal(value, before[name])
        )
    for table in tables:
        mean = table.weight[:n].double().mean(0)
        assert torch.equal(table.weight[n], table.weight[n + 1])
        torch.testing.assert_close(
            table.weight[n].double(), mean, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-9
        )
    assert (
        words("t5 <|im_end|> t7")["input_ids"] == [5, n, 7] and words.decode([5, n], skip_special_tokens=True) == "t5"
    )


@pytest.mark.parametrize("n, scored", [(60, 64), (66, 64), (60, 60), (60, 70)])
def test_new_tokens_are_the_same_at_once_one_by_one_and_in_a_copy(n, scored):
    "Also where tokens have no row yet, or the output is of another length: so that a ticket finds its base again."
    pairs = []
    for _ in range(2):
        pairs.append((biased(), vocabulary(n)))
        pairs[-1][0].lm_head = torch.nn.Linear(16, scored).requires_grad_(False)
        for p in pairs[-1][0].lm_head.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape) / 100)
    add_tokens(*pairs[0], NEW + ["<a>", "<b>", "<c>"])
    add_tokens(*pairs[1], NEW[:1])
    (one, words), (two, others) = pairs[0], copy.deepcopy(pairs[1])
    add_tokens(two, others, [*NEW[1:], "<a>", "<b>", "<c>"])
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert words.backend_tokenizer.to_str() == others.backend_tokenizer.to_str()
    assert two.kslottery_tokens == (*NEW, "<a>", "<b>", "<c>") and len(one.lm_head.bias) == max(n + 5, scored)
    known = min(n, 64)
    for table in (one.get_input_embeddings().weight, one.lm_head.weight, one.lm_head.bias):
        assert torch.allclose(table[n : n + 5], table[:known].mean(0), atol=1e-6)


def test_tokens_that_cannot_be_new():
    gaps = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a")))
    model = tiny_model("llama")
    odd = tiny_model("llama")
    odd.lm_head = torch.nn.Sequential(odd.lm_head)
    odd.get_output_embeddings = lambda: odd.lm_head
    for who, words, tokens, said in (
        (model, vocabulary(), ["t5"], "'t5' is in the vocabulary already, as id 5: tune its row"),
        (model, vocabulary(), ["<a>", "<a>"], "give a list of distinct texts"),
        (model, vocabulary(), [], "give a list of distinct texts"),
        (model, vocabulary(), ["<a>", 3], "give a list of distinct texts"),
        (model, gaps, ["<a>", "<b>", "<c>"], "gaps, and it would give an id out that is taken"),
        (odd, vocabulary(), ["<a>"], "linear output"),
    ):
        size, before = len(words), state(who)
        with pytest.raises(ValueError, match=said):
            add_tokens(who, words, tokens)
        assert len(words) == size and all(torch.equal(before[k], v) for k, v in state(who).items())


def test_sample_ids():
    assert (
        sample_ids(range(100), 10, seed=1).tolist()
        == sample_ids(range(100), 10, seed=1).tolist()
        != sample_ids(range(100), 10, seed=2).tolist()
    )
    assert len(set(sample_ids([5, 5, 6], 5).tolist())) == 2
