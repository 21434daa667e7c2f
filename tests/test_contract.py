"""What every model file promises, held for all eight of them."""
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

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


OPTIMIZERS = {   # betas, eps, L2Wrap: of nanoGPT; of Llama 2's paper; of RWKV-LM's train.py
    "gpt": ((0.9, 0.95), 1e-8, None), "llama3": ((0.9, 0.95), 1e-5, None),
    "glm4": ((0.9, 0.95), 1e-8, None), "rwkv6": ((0.9, 0.99), 1e-8, 1e-4),
    "rwkv2": ((0.9, 0.99), 4e-9, None), "rwkv3": ((0.9, 0.99), 4e-9, None),
    "rwkv4": ((0.9, 0.99), 1e-8, 1e-4), "rwkv5": ((0.9, 0.99), 1e-8, 1e-4)}


@EIGHT
def test_the_settings_of_the_optimiser_are_the_authors(name):
    model_class = train.model_parts(name)[0]
    betas, eps, penalty = OPTIMIZERS[name]
    assert model_class.OPTIMIZER == dict(betas=betas, eps=eps)
    assert getattr(model_class, "L2WRAP", None) == penalty


@EIGHT
def test_each_group_states_its_rate_its_decay_and_whether_muon_may_have_it(name):
    for group in small(name).parameter_groups(0.3):
        assert set(group) == {"params", "weight_decay", "lr_scale", "hidden_matrix"}
        assert group["weight_decay"] in (0.0, 0.3) and type(group["hidden_matrix"]) is bool
        if not name.startswith("rwkv"):
            assert group["lr_scale"] == 1.0
        elif group["hidden_matrix"]:
            assert group["lr_scale"] == 1.0 and {p.dim() for p in group["params"]} == {2}


@EIGHT
def test_rows_go_on_from_different_positions_of_one_state(name):
    """One token a row, and then two, beside rows that are computed alone."""
    model, rows = small(name), [[5, 9, 2, 7, 1], [3, 8], [4, 4, 6]]
    state = model.new_state(3, 8)
    with torch.no_grad():
        for i, row in enumerate(rows):
            model.hidden(torch.tensor([row]), state._make(t[i:i + 1] for t in state))
        assert state.position.tolist() == [5, 2, 3]
        for new in ([[4], [6], [60]], [[1, 2], [3, 4], [5, 6]]):
            got = model(torch.tensor(new), state)
            rows = [row + more for row, more in zip(rows, new)]
            for i, row in enumerate(rows):
                want = model(torch.tensor([row]))[0, -len(new[0]):]
                assert torch.allclose(got[i], want, atol=2e-5 * want.abs().max()), (name, i)
    assert state.position.tolist() == [8, 5, 6]


@EIGHT
def test_a_sequence_in_any_pieces_equals_it_whole(name):
    """The first piece of one token, of none and of several: each has a mask of its own."""
    model, tokens = small(name), (torch.arange(20) * 7 % 61).view(2, 10)
    with torch.no_grad():
        whole = model(tokens)
        for pieces in ([1, 3, 2, 1, 3], [2, 1, 1, 6], [10], [9, 1], [1] * 10, [4, 6]):
            state = model.new_state(2, 10)
            got = torch.cat([model(piece, state) for piece in tokens.split(pieces, dim=1)], 1)
            assert torch.allclose(got, whole, atol=2e-5 * whole.abs().max()), pieces


@EIGHT
def test_a_model_is_not_saved_beside_the_index_of_another(name, tmp_path):
    if not name.startswith("rwkv"):
        (tmp_path / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(ValueError, match="model.safetensors.index.json.*which may be read instead: move it"):
            small(name).save_pretrained(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors.index.json"]


@EIGHT
def test_a_state_of_other_rows_and_a_sequence_that_does_not_fit_are_refused(name):
    model = small(name)
    with pytest.raises(ValueError, match="3 rows of tokens, but a state of 2"):
        model.hidden(torch.zeros(3, 1, dtype=torch.int64), model.new_state(2, 9))
    if model.config.context:
        with pytest.raises(ValueError, match="41 tokens.*context of 40"):
            model.hidden(torch.zeros(1, 41, dtype=torch.int64))
        assert model.hidden(torch.zeros(1, 40, dtype=torch.int64)).shape == (1, 40, 32)
        state = model.new_state(2, 9)
        model.hidden(torch.zeros(2, 9, dtype=torch.int64), state)
        for tokens in (1, 2):
            with pytest.raises(ValueError, match=f"{9 + tokens} tokens do not fit.*is 40.*state 9"):
                model.hidden(torch.zeros(2, tokens, dtype=torch.int64), state)
        assert model.new_state(1, 99).capacity == 40


@EIGHT
def test_a_forward_pass_and_a_state_keep_to_the_device_of_the_weights(name):
    """On the meta device, which computes shapes only: a tensor left on the CPU would be refused."""
    model = small(name).to("meta")
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    assert model(tokens).device.type == model.hidden(tokens).device.type == "meta"
    assert {tensor.device.type for tensor in model.new_state(2, 9)} == {"meta"}


@EIGHT
def test_a_model_is_loaded_in_the_dtype_asked_for_ready_to_use(name, tmp_path):
    model = small(name)
    model.save_pretrained(tmp_path)
    for dtype, want in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        again = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in again.parameters()} == {want} and not again.training
        assert all(p.requires_grad and p.is_contiguous() for p in again.parameters())
        assert not any(module.training for module in again.modules())
    assert {p.device.type for p in type(model).from_pretrained(tmp_path, "meta").parameters()} == {"meta"}


@EIGHT
def test_loading_maps_the_file_and_does_not_copy_it(name, tmp_path):
    """The memory of the head lies in the mapping of the file."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    model = small(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps.read_text().splitlines()
              if str(tmp_path) in line]
    head = (again.lm_head if hasattr(again, "lm_head") else again.head).weight
    assert any(low <= head.data_ptr() < high for low, high in ranges)


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
