"""lm-evaluation-harness, where it is installed: each form of a ticket writes what the library writes with its rows."""

import json

import pytest

from conftest import TOY, invoke, talker
from kslottery import Generation, Prompt, Recipe, find_ticket, load_model, translate
from kslottery.data import Pair

TASK = """task: free
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: [], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: chrf, aggregation: chrf, higher_is_better: true}}]
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_every_form_writes_the_same(kind, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed here: make setup-harness")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = talker(kind)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = TOY.eos_token_id, TOY.pad_token_id
    model.save_pretrained("base")
    TOY.save_pretrained("base")
    model, tokenizer = load_model("base", device="cpu", dtype="float32")
    prompt = Prompt("t40 {source} t41 {target}")
    pairs = [Pair(str(i), f"t{i} t{i + 3} t{i + 9}", f"t{i + 20} t{i + 21}") for i in range(20, 36)]
    recipe = Recipe(lr_embed=0.3, lr_partial=0.3, epochs_embed=1, epochs_partial=2, batch_size=5, progress=False)
    ticket = find_ticket(model, tokenizer, pairs, prompt, top_k=4, recipe=recipe)
    ticket.save("ticket")
    asked = [prompt.text.replace("{source}", p.source).replace("{target}", "").rstrip() for p in pairs]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"prompt": q, "target": "t1"}) + "\n" for q in asked))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "free.yaml").write_text(TASK.format(file=tmp_path / "test.jsonl"))
    tasks = TaskManager(include_path="tasks", include_defaults=False)

    def written(**where):
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"dtype": "float32", **where},
            tasks=["free"],
            task_manager=tasks,
            batch_size=4,
            device="cpu",
            bootstrap_iters=0,
        )
        return [sample["resps"][0][0].strip() for sample in found["samples"]["free"]]

    base, rows = (
        [one.text for one in translate(model, tokenizer, pairs, prompt, some, generation=Generation(6), progress=False)]
        for some in (None, ticket.rows)
    )
    assert base != rows and written(pretrained="base") == base
    assert invoke("merge", "ticket", "--out", "merged")[0] == 0 and written(pretrained="merged") == rows
    assert invoke("peft", "ticket", "--as", "lora", "--out", "lora")[0] == 0
    assert written(pretrained="base", peft="lora") == rows
    if kind == "llama":  # on a tied model trainable tokens would change the output, too
        assert written(pretrained="base", peft="ticket") == rows
