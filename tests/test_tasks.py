"""finetune.py, piece by piece and without a run: what each task does with what it is given."""
import math

import pytest
import torch
from helpers import assert_close
from test_finetune import ALONE, tiny

import finetune
import lora
import tokenizer as text
from rows import code_reward


def settings_of(task, **changes):
    return finetune.Settings(**{"task": task, "context": 96, "max_new_tokens": 20, "group": 4, "micro_batch": 64,
                                "data": ["x"], "init_from": "nowhere", **changes})


def grpo(score, model=None, **changes):
    """A GRPO task over bytes whose completions are ended by one byte in six; score(prompt, texts, ended)."""
    task = finetune.GRPO(settings_of("grpo", **changes), ALONE, text.Bytes(), model or tiny("gpt"), {})
    task.stop |= set(range(100, 140))
    task.score = score
    return task


def prompts_of(task, *words):
    return [task.example({"prompt": word}) for word in words]


# --- grpo ---

def test_after_a_rollout_the_new_log_probabilities_are_the_old_and_the_loss_is_minus_the_advantages():
    task = grpo(lambda prompt, texts, ended: [float(len(words)) for words in texts])
    for batch in task.rollouts(prompts_of(task, "abc", "de"), 0):
        drawn = batch["targets"] != -100
        new = finetune.log_probs(task.model, batch, task.settings.temperature)
        assert_close(new, batch["old"], 1e-6, "log-probabilities")
        assert batch["old"].requires_grad is False and not batch["old"][~drawn].any()
        total, count = task(batch)
        assert int(count) == int(drawn.sum())
        want = -(batch["advantage"][:, None] * drawn).sum()
        assert total.item() == pytest.approx(want.item(), abs=1e-3)
        total.backward()
        assert any(p.grad is not None and p.grad.any() for p in task.model.parameters())


def test_each_prompt_is_drawn_as_often_as_said_and_groups_are_not_mixed():
    heard = []

    def score(prompt, texts, ended):
        heard.append((prompt["prompt"], len(texts), len(ended)))
        return [len(heard) * 10.0] * 3 + [len(heard) * 10.0 + 1]        # all of one group are alike but one
    task = grpo(score)
    made = task.draw(prompts_of(task, "abc", "de", "f"), seed=1)
    assert heard == [("abc", 4, 4), ("de", 4, 4), ("f", 4, 4)] and len(made) == 12
    better = finetune.advantages([0, 0, 0, 1])
    assert [m["advantage"] for m in made] == pytest.approx(better * 3)
    assert [m["reward"] for m in made] == [10, 10, 10, 11, 20, 20, 20, 21, 30, 30, 30, 31]
    for n, made_of in enumerate(made):
        asked = prompts_of(task, ("abc", "de", "f")[n // 4])[0]["rows"][0][0]
        inputs, targets = made_of["rows"][0]
        assert inputs[:len(asked)] == asked and set(targets[:len(asked) - 1]) <= {-100}
        assert inputs[len(asked):] == targets[len(asked) - 1:-1] and made_of["drawn"] == len(targets) - len(asked) + 1
    again = task.draw(prompts_of(task, "abc", "de", "f"), seed=1)
    assert [m["rows"] for m in again] == [m["rows"] for m in made]
    assert [m["rows"] for m in task.draw(prompts_of(task, "abc"), seed=2)] != [m["rows"] for m in made[:4]]
    means = task.means(made)
    assert means["reward"] == pytest.approx(20.25) and means["length"] == sum(m["drawn"] for m in made) / 12
    assert task.means([{**m, "text": "same"} for m in made])["distinct"] == pytest.approx(3 / 12)


def test_a_completion_that_was_cut_is_told_to_the_reward_and_earns_nothing():
    flags = []

    def score(prompt, texts, ended):
        flags.extend(ended)
        return code_reward("def f():\n", ["    a = 1\n    b = 2\n"] * len(texts), ended)
    task = grpo(score, max_new_tokens=3)
    made = task.draw(prompts_of(task, "abc", "de", "f", "gh"), seed=0)
    ends = [m["rows"][0][1][-1] in task.stop for m in made]
    assert flags == ends and {True, False} == {*ends}
    assert all(m["reward"] == 0 for m, end in zip(made, ends) if not end) and any(m["reward"] for m in made)
    assert code_reward("def f():\n", ["    a = 1\n    b = 2\n"] * 2, [True, True]) == [1, 0]
    assert code_reward("def f():\n", ["    a = 1\n    b = 2\n"], [False]) == [0]


def test_completions_serve_the_updates_that_were_asked_for_and_then_are_drawn_anew():
    task, chosen = grpo(lambda prompt, texts, ended: [0.0, 1.0, 0.0, 1.0], updates=3), []

    class Batches:
        def chosen(self, step):
            chosen.append(step)
            return prompts_of(task, "abc")
    got = [task.micro_batches(Batches(), step) for step in range(7)]
    assert chosen == [0, 1, 2]
    assert got[0] is got[1] is got[2] and got[3] is got[4] is got[5] and got[2] is not got[3]


def test_the_clipped_objective_lets_no_token_go_further_than_the_ratio():
    new = torch.tensor([[0.0, 0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    old = torch.zeros(1, 5)
    advantage = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0]])
    finetune.grpo_loss(new, old, old, advantage, 0.2, 0.0).sum().backward()
    want = [-1.0, 0.0, -math.exp(-0.5), math.exp(0.5), 0.0]
    assert new.grad[0].tolist() == pytest.approx(want)
    gap = torch.tensor([[0.3]])
    loss = finetune.grpo_loss(torch.zeros(1, 1), torch.zeros(1, 1), gap, torch.zeros(1, 1), 0.2, 2.0)
    assert loss.item() == pytest.approx(2 * (math.exp(0.3) - 1 - 0.3), rel=1e-5)
    assert finetune.advantages([1.0, 1.0, 1.0]) == [0, 0, 0]


# --- dpo ---

@pytest.mark.parametrize("margin, right, told", [
    (1e-6, 0.5, 0.0), (-1e-6, 0.5, 0.0), (2e-4, 1.0, 2e-4), (-2e-4, 0.0, -2e-4), (3.0, 1.0, 3.0), (0.0, 0.5, 0.0)])
def test_a_margin_within_rounding_is_a_tie(margin, right, told, monkeypatch):
    task = finetune.DPO(settings_of("dpo"), ALONE, text.Bytes(), tiny("gpt"), {})
    monkeypatch.setattr(task, "margins", lambda batch: torch.full((len(batch["reference"]),), margin))
    example = {"rows": [([1, 2], [-100, 3]), ([1, 2], [-100, 4])], "reference": 0.0}
    measured = task.measures([example] * 3)
    assert measured["accuracy"] == right and measured["margin"] == pytest.approx(told)
    assert measured["val_loss"] == pytest.approx(math.log(1 + math.exp(-told)))


def test_the_margin_is_beta_times_what_the_ratio_has_grown():
    task = finetune.DPO(settings_of("dpo", beta=0.3), ALONE, text.Bytes(), tiny("gpt"), {})
    examples = [{"rows": [([1, 2, 3], [-100, 3, 4]), ([1, 2], [-100, 9])], "reference": 0.0},
                {"rows": [([5, 6], [-100, 7]), ([5, 6, 7], [-100, 8, 9])], "reference": 0.0}]
    task.remember_start(examples)
    with torch.no_grad():
        for example in examples:
            (chosen, wanted), (rejected, other) = example["rows"]
            sums = []
            for ids, targets in ((chosen, wanted), (rejected, other)):
                p = task.model(torch.tensor([ids]))[0].log_softmax(-1)
                sums.append(sum(p[t, id].item() for t, id in enumerate(targets) if id != -100))
            assert example["reference"] == pytest.approx(sums[0] - sums[1], abs=1e-4)
        [(_, batch)] = [*task.on_device(examples)]
        assert task.margins(batch).abs().max() < 1e-4
        batch["reference"] = batch["reference"] - 2.0
        assert task.margins(batch).tolist() == pytest.approx([0.6, 0.6], abs=1e-4)


# --- classify ---

def test_the_head_of_a_classifier_learns_and_reads_the_last_token():
    task = finetune.Classify(settings_of("classify", tune="all"), ALONE, text.Bytes(), tiny("gpt"),
                             {"labels": ["a", "b", "c"]})
    examples = [{"rows": [([5, 6, 7], [-100] * 3)], "label": 1}, {"rows": [([8], [-100])], "label": 2}]
    [(_, batch)] = [*task.on_device(examples)]
    with torch.no_grad():
        got = task.logits(batch)
        for row, ids in zip(got, ([8], [5, 6, 7]) if batch["length"][0] == 1 else ([5, 6, 7], [8])):
            assert_close(row, task.head(task.model.hidden(torch.tensor([ids]))[0, -1]), 1e-5, "logits")
    total, count = task(batch)
    total.backward()
    assert count == 2 and all(p.grad.abs().min() > 0 for p in task.head.parameters())
    groups = task.parameter_groups(0.3)
    [head] = [group for group in groups if any(p is task.head.weight for p in group["params"])]
    assert {k: v for k, v in head.items() if k != "params"} == dict(weight_decay=0.0, lr_scale=1.0, hidden_matrix=False)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in task.parameters()}
    assert 0.01 < task.head.weight.std() < 0.03


# --- defaults ---

@pytest.mark.parametrize("task, batch, epochs, lr, chat", [
    ("sft", 16, 3, 1e-3, "alpaca"), ("classify", 16, 4, 1e-3, "alpaca"), ("dpo", 16, 2, 3e-4, "alpaca"),
    ("grpo", 8, 1, 1e-3, "none")])
def test_the_defaults_of_each_task(task, batch, epochs, lr, chat):
    """At width 32: the rate is that of width 256 times 8², with adapters times 3 · 8."""
    for changes, epochs_, factor, alpha in (({}, epochs, 64, None), (dict(steps=5), None, 64, None),
                                            (dict(lora=3), epochs, 24, 6.0)):
        settings = settings_of(task, context=None, **changes)
        finetune.fill_defaults(settings, text.Bytes(), tiny("gpt"))
        assert (settings.batch, settings.epochs, settings.lora_alpha) == (batch, epochs_, alpha)
        assert settings.lr == pytest.approx(lr * factor) and settings.context == 256 and settings.chat == chat
    given = settings_of(task, batch=3, epochs=2.5, lr=0.7, lora=4, lora_alpha=1.0, chat="none")
    finetune.fill_defaults(given, text.Bytes(), tiny("gpt"))
    assert (given.batch, given.epochs, given.lr, given.lora_alpha, given.chat, given.context) == (3, 2.5, 0.7, 1.0, "none", 96)
    with pytest.raises(ValueError, match="--context 300: the model's is 256"):
        finetune.fill_defaults(settings_of(task, context=300), text.Bytes(), tiny("gpt"))
    plain = finetune.Settings()
    assert (plain.beta, plain.label_smoothing, plain.group, plain.temperature, plain.updates, plain.clip_ratio, plain.kl) \
        == (0.1, 0.0, 8, 0.8, 2, 0.2, 0.05)
    assert (plain.hold_out, plain.eval_examples, plain.max_new_tokens, plain.weight_decay) == (0.1, 256, 64, 0.0)


@pytest.mark.parametrize("task", ["sft", "classify", "dpo", "grpo"])
def test_dropout_is_on_in_sft_only(task):
    model = tiny("gpt")
    made = finetune.open_task(settings_of(task), ALONE, text.Bytes(), model,
                              [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], {}, finetune.Notices())
    assert {module.training for module in made.model.modules()} == {task == "sft"}
    if task == "sft":
        made.measures([{"rows": [([1, 2], [-100, 3])]}])
        assert all(module.training for module in made.modules())        # and on again after it


# --- padding ---

def test_the_penalty_on_large_logits_is_not_on_padding_or_prompts():
    """RWKV's L2Wrap: the gradients of a padded batch are those of its rows."""
    model = tiny("rwkv6")
    task = finetune.SFT(settings_of("sft"), ALONE, text.Bytes(), model, {}).train()
    short, long = ([5, 6], [-100, 7]), ([8, 9, 10, 11, 12], [-100, 9, 9, -100, 9])
    got = []
    model.L2WRAP = 0.5                       # an instance's own, large enough to be seen
    for batches in ([[short, long]], [[short], [long]]):
        model.zero_grad()
        for rows in batches:
            task(finetune.collate([{"rows": [row]} for row in rows], 96))[0].backward()
        got.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*got):
        assert_close(ours, theirs, 1e-4, "gradient")
    model.zero_grad()
    model.L2WRAP = 0.0
    task(finetune.collate([{"rows": [short]}, {"rows": [long]}], 96))[0].backward()
    assert any((p.grad - g).abs().max() > 1e-4 for p, g in zip(model.parameters(), got[0]))


# --- adapters ---

@pytest.mark.parametrize("stated, rank, scale", [
    ({}, 8, 1.0), ({"r": 4}, 4, 2.0), ({"r": 4, "lora_alpha": 6}, 4, 1.5), ({"lora_alpha": 16}, 8, 2.0),
    ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 4, 3.0), ({"r": 4, "use_rslora": True}, 4, 4.0),
    ({"r": 4, "lora_alpha": None}, 4, 2.0), ({"r": 4, "alpha_pattern": {"q_proj": 12}}, 4, 3.0),
    ({"r": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 4}, "lora_alpha": 6}, 4, 1.5),
    ({"r": 4, "alpha_pattern": {"k_proj": 12, "_proj": 100}}, 4, 2.0)])
def test_what_an_adapter_is_multiplied_by(stated, rank, scale):
    """alpha / r, or alpha / sqrt(r); peft's defaults are 8 and 8; a pattern counts at the end of a name."""
    layer = "model.layers.1.self_attn.q_proj"
    assert lora.scale_of(stated, layer, rank) == pytest.approx(scale)
    with pytest.raises(ValueError, match=f"is of rank {rank + 1}, but the adapter's config says {rank}"):
        lora.scale_of(stated, layer, rank + 1)
