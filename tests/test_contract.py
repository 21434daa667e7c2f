"""What every model file promises, held for all eight of them."""
import importlib
import json
import math
from dataclasses import replace

import pytest
import torch

import train

EIGHT = pytest.mark.parametrize("name", train.MODELS)


def small(name, **changes):
    """A model of two blocks with peaked, varied distributions."""
    torch.manual_seed(3)
    model_class, config_class, _ = train.model_parts(name)
    config = config_class.sized(2, 32, 61, 40)
    if name == "gpt":
        config = replace(config, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    model = model_class(replace(config, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@EIGHT
def test_generate_after_train_equals_generate_after_eval(name):
    model = small(name)
    want = model.generate([[3, 1, 4], [1, 5]], 12, temperature=0)
    model.train()
    next(iter(model.children())).eval()      # modes differ between modules, and stay so
    modes = [module.training for module in model.modules()]
    assert model.generate([[3, 1, 4], [1, 5]], 12, temperature=0) == want
    assert [module.training for module in model.modules()] == modes

    def fail(row, token):
        raise KeyError(token)
    with pytest.raises(KeyError):
        model.generate([[3, 1, 4]], 5, on_token=fail)
    assert [module.training for module in model.modules()] == modes


@EIGHT
def test_a_greedy_run_stops_at_the_configs_eos_token_unless_told_otherwise(name):
    model = small(name)
    [full] = model.generate([[3, 1, 4]], 20, temperature=0)
    end = full[5]
    other = next(token for token in range(61) if token not in full)
    for eos in (end, [other, end]):
        model.config = replace(model.config, eos_token_id=eos)
        assert model.generate([[3, 1, 4]], 20, temperature=0) == [full[:full.index(end)]]
        assert model.generate([[3, 1, 4]], 20, temperature=0, stop=()) == [full]


@EIGHT
def test_adamw_takes_the_groups_as_they_are_and_norms_and_biases_do_not_decay(name):
    model = small(name)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.3), lr=1e-3, **model.OPTIMIZER)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sorted(decay) == sorted(id(p) for p in model.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    for path, p in model.named_parameters():
        if path.endswith("bias") or p.dim() == 1:
            assert decay[id(p)] == 0.0, path
    assert (0.3 in decay.values()) == (name not in ("rwkv2", "rwkv3"))      # their authors: no decay
    matrices = {id(p) for group in optimizer.param_groups if group["hidden_matrix"] for p in group["params"]}
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    linears = {id(m.weight) for m in blocks.modules() if isinstance(m, torch.nn.Linear)}
    assert matrices == linears and len(linears) >= 8


@EIGHT
def test_last_gives_the_logits_of_the_last_token_only(name):
    model, tokens = small(name), torch.arange(18).view(2, 9)
    with torch.no_grad():
        every, last = model(tokens), model(tokens, last=True)
        state = model.new_state(2, 9)
        model(tokens[:, :5], state)
        again = model(tokens[:, 5:], state, last=True)
    assert last.shape == again.shape == (2, 1, 61)
    assert torch.allclose(last, every[:, -1:], atol=1e-5) and torch.allclose(again, last, atol=1e-4)


@EIGHT
def test_the_head_is_a_module_that_can_be_replaced(name):
    """Also where its weight is the token table: what stands in its place is used everywhere."""
    model, tokens = small(name), torch.arange(9)[None]
    head = model.lm_head if hasattr(model, "lm_head") else model.head

    class Double(torch.nn.Module):
        def forward(self, x):
            return 2 * head(x)
    before = model(tokens)
    setattr(model, "lm_head" if hasattr(model, "lm_head") else "head", Double())
    assert torch.equal(model(tokens), 2 * before)
    assert torch.equal(model.logits(model.hidden(tokens)), 2 * before)


@EIGHT
def test_a_state_is_a_named_tuple_of_tensors_with_the_batch_first(name):
    model = small(name)
    state = model.new_state(3, 7)
    assert isinstance(state, tuple) and state._fields[0] == "position"
    assert state.position.dtype == torch.int64
    assert all(isinstance(tensor, torch.Tensor) and len(tensor) == 3 for tensor in state)
    assert state.capacity == (7 if model.config.context else math.inf)


@EIGHT
def test_config_json_is_the_config(name, tmp_path):
    model = small(name, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=4)
    model.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    assert (stated["bos_token_id"], stated["eos_token_id"], stated["pad_token_id"]) == (1, [2, 3], 4)
    again = train.load_checkpoint(tmp_path)
    assert again.config == model.config
    for path, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[path]), path
    module = importlib.import_module(type(model).__module__)
    assert not hasattr(module, "main") and not hasattr(module, "argparse")
    assert hasattr(model, "L2WRAP") == (name in ("rwkv4", "rwkv5", "rwkv6"))
