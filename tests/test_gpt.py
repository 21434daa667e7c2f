"""gpt.py against the official code, and against itself."""
import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import (assert_close, assert_gradient, continuation, cross_entropy, published, run)
from safetensors.torch import load_file, save_file

from gpt import GPT, SIZES, GPTConfig, State, read_hugging_face, read_nanogpt, read_tensors, to_ours
from train import load_checkpoint

LAYOUTS = ("gpt2", "gpt2/prefixed", "gpt2/bin")


@pytest.fixture(scope="module")
def expected(golden):
    return published(golden / "gpt2")


@pytest.fixture(scope="module")
def model(golden):
    return GPT.from_pretrained(golden / "gpt2")


def small(**changes):
    torch.manual_seed(0)
    return GPT(replace(GPTConfig.sized(2, 32, 61, 40), **changes)).eval()


# --- goldens ---

@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpt2_logits_equal_transformers(golden, expected, layout):
    model = GPT.from_pretrained(golden / layout)
    assert_close(model(expected["tokens"]), expected["logits"], 2e-5, layout)


def test_gpt2_loss_and_gradients_equal_transformers(golden, expected):
    model = GPT.from_pretrained(golden / "gpt2")
    loss = cross_entropy(model, expected["tokens"])
    loss.backward()
    assert_close(loss, expected["loss"], 1e-6, "loss")
    for name, parameter in model.named_parameters():
        turned = ".c_" in name and name.endswith("weight")              # Conv1D: (in, out)
        assert_gradient(parameter.grad.t() if turned else parameter.grad, expected, name, 1e-5)


def test_gpt2_greedy_ids_equal_transformers(model, expected):
    prompts = expected["greedy_prompt"].tolist()
    assert model.generate(prompts, 16, temperature=0) == expected["greedy_ids"].tolist()


def test_gpt2_rows_of_different_lengths_equal_the_padded_batch_of_transformers(model, expected):
    mask = expected["leftpad_attention_mask"].bool()
    prompts = [ids[keep].tolist() for ids, keep in zip(expected["leftpad_input_ids"], mask)]
    assert len({len(prompt) for prompt in prompts}) > 1
    assert model.generate(prompts, 16, temperature=0) == expected["leftpad_greedy_ids"].tolist()
    for prompt, logits in zip(prompts, expected["leftpad_last_logits"]):
        assert_close(model(torch.tensor([prompt]))[0, -1], logits, 2e-5, "row")


def test_nanogpt_checkpoints_equal_nanogpt(golden):
    expected = published(golden / "gpt2/nanogpt")
    for file, prefix in (("ckpt.pt", ""), ("ckpt_nobias_compiled.pt", "nobias_")):
        model = GPT.from_pretrained(golden / "gpt2/nanogpt" / file)
        logits = model(expected["tokens"])
        want = expected["logits"] if not prefix else expected["nobias_last_logits"]
        assert_close(logits[:, -want.shape[1]:], want, 2e-5, file)
        greedy = model.generate(expected["greedy_prompt"].tolist(), 16, temperature=0)
        assert greedy == expected[f"{prefix}greedy_ids"].tolist()


def test_nanogpt_sliding_window_equals_model_of_the_last_ids(golden):
    expected = published(golden / "gpt2/nanogpt")
    model = GPT.from_pretrained(golden / "gpt2/nanogpt")
    ids = expected["long_prompt"][0].tolist()
    for _ in range(10):                      # nanoGPT restarts positions once the window slides
        ids.append(int(model(torch.tensor([ids[-48:]]))[0, -1].argmax()))
    assert ids[-10:] == expected["long_greedy_ids"][0].tolist()


def test_bf16_logits_are_no_further_from_fp32_than_the_official_ones(golden, expected):
    model = GPT.from_pretrained(golden / "gpt2", dtype=torch.bfloat16)
    ours = (model(expected["tokens"]).float() - expected["logits"]).abs().mean()
    assert ours <= 1.1 * expected["bf16_error"]


# --- sizes and initialisation ---

@pytest.mark.parametrize("name, count", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
    ("gpt2-xl", 1_557_611_200)])
def test_published_sizes_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(SIZES[name]).parameters()) == count


def test_the_sizes_state_what_the_published_configs_state():
    told = {name: (c.n_embd, c.n_layer, c.n_head, c.n_inner) for name, c in SIZES.items()}
    assert told == {"gpt2": (768, 12, 12, 3072), "gpt2-medium": (1024, 24, 16, 4096),
                    "gpt2-large": (1280, 36, 20, 5120), "gpt2-xl": (1600, 48, 25, 6400)}
    for c in SIZES.values():
        assert (c.vocab_size, c.n_positions, c.bos_token_id, c.eos_token_id) == (50257, 1024, 50256, 50256)
        assert (c.embd_pdrop, c.attn_pdrop, c.resid_pdrop) == (0.1, 0.1, 0.1)
        assert c.layer_norm_epsilon == 1e-5 and c.activation_function == "gelu_new"
        assert c.pad_token_id is None and c.bias and c.tie_word_embeddings


def test_fields_that_a_config_leaves_out_have_the_defaults_of_transformers(tmp_path):
    """But for dropout, which is off unless it is asked for."""
    for stated, changes in (
            ({}, {}), ({"n_layer": None, "n_inner": None}, {}), ({"n_inner": 7}, {"n_inner": 7}),
            ({"n_embd": 48}, {"n_embd": 48, "n_inner": 192}), ({"n_head": 3}, {"n_head": 3})):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **stated}))
        plain = replace(SIZES["gpt2"], embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
                        bos_token_id=None, eos_token_id=None)
        assert read_hugging_face(tmp_path)[0] == replace(plain, **changes), stated
        assert read_hugging_face(tmp_path / "model.safetensors")[0] == replace(plain, **changes)


@pytest.mark.parametrize("name, value", [
    ("model_type", "gptj"), ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True),
    ("reorder_and_upcast_attn", True), ("add_cross_attention", True)])
def test_a_config_of_other_mathematics_is_refused_by_name(name, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", name: value}))
    with pytest.raises(ValueError, match=f"{name} = {value!r}"):
        read_hugging_face(tmp_path)


@pytest.mark.parametrize("width, heads", [
    (1, 1), (32, 1), (64, 1), (127, 1), (128, 2), (130, 2), (192, 3), (250, 2), (256, 4), (768, 12),
    (1600, 25)])
def test_sized_has_heads_of_about_64_channels_and_an_mlp_four_times_as_wide(width, heads):
    assert GPTConfig.sized(3, width, 99, 50) == GPTConfig(99, 50, width, 3, heads, n_inner=4 * width)


def test_initial_values_are_those_of_the_authors():
    torch.manual_seed(0)
    model = GPT(GPTConfig.sized(8, 128, 512, 256))
    std = {name: parameter.std().item() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            want = 0.01 if name == "wpe.weight" else 0.005 if "c_proj" in name else 0.02
            assert std[name] == pytest.approx(want, rel=0.05), name     # 0.02 / sqrt(2 * 8) = 0.005


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = small()
    groups = model.parameter_groups(0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    blocks = {id(p) for p in model.h.parameters()}
    for group in groups:
        assert group["lr_scale"] == 1.0 and len(group["params"]) > 1 - group["hidden_matrix"]
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.dim() >= 2 else 0.0)
            assert group["hidden_matrix"] == (p.dim() == 2 and id(p) in blocks)


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("n_layer", -1), ("n_head", 5), ("activation_function", "relu"),
    ("resid_pdrop", 1.5), ("layer_norm_epsilon", -1.0), ("n_positions", 0), ("n_embd", 0),
    ("n_head", 0), ("n_inner", 0), ("embd_pdrop", 1.0), ("attn_pdrop", -0.1),
    ("layer_norm_epsilon", 1.0)])
def test_an_impossible_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        replace(GPTConfig.sized(2, 32, 61, 40), **{field: value})


def test_each_dropout_stands_where_it_should_and_acts_by_itself():
    """At a rate of almost 1 nothing passes: what then is left shows the place."""
    tokens, all_of_it = torch.arange(12)[None], 1 - 1e-15
    with torch.no_grad():
        plain = small(embd_pdrop=all_of_it).train()
        assert torch.equal(plain.hidden(tokens)[0, 0], plain.hidden(tokens.flip(1))[0, 0])
        assert not torch.equal(plain.hidden(tokens), small().hidden(tokens))
        model = small(resid_pdrop=all_of_it).train()                    # neither half of a block adds
        x = model.wte(tokens) + model.wpe(torch.arange(12))
        assert torch.equal(model.hidden(tokens), model.ln_f(x))
        model, silent = small(attn_pdrop=all_of_it).train(), small()
        for block in silent.h:
            block.attn.c_attn.weight[64:].zero_()                       # all values are 0
        assert_close(model.hidden(tokens), silent.hidden(tokens), 1e-6, "no attention")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            model, two = small(**{name: 0.3}), tokens.expand(2, -1)
            assert torch.equal(*model.hidden(two)), name
            assert not torch.equal(*model.train().hidden(two)), name


def test_dropout_acts_in_training_only():
    model = small(embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_gelu_has_the_tanh_form_under_both_of_its_names_and_the_exact_form():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    exact = x * (1 + torch.erf(x / 2**0.5)) / 2
    tanh = x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    for name, want in (("gelu_new", tanh), ("gelu_pytorch_tanh", tanh), ("gelu", exact)):
        assert_close(small(activation_function=name).h[0].mlp.gelu(x), want, 1e-12, name)


def test_the_layer_norms_have_the_eps_and_the_bias_of_the_config():
    for eps, bias in ((1e-5, True), (0.5, False)):
        model = small(layer_norm_epsilon=eps, bias=bias)
        norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
        assert len(norms) == 5 and {norm.eps for norm in norms} == {eps}
        assert {name.endswith("bias") for name, _ in model.named_parameters()} == {False, bias}
        x = torch.randn(3, 32)
        wide = (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        assert_close(norms[-1](x), wide, 1e-6, "LN")


# --- the state ---

def test_a_cached_pass_in_pieces_equals_one_pass(model, expected):
    tokens = expected["tokens"]
    state = model.new_state(len(tokens), 30)
    with torch.no_grad():
        pieces = [model(piece, state) for piece in tokens.split([5, 1, 11, 7], dim=1)]
    # Other lengths, other orders of fp32 sums: 1e-5 relative holds with any number of threads.
    assert_close(torch.cat(pieces, 1), model(tokens), 1e-5, "logits")
    assert state.position.tolist() == [24, 24]


def test_gradients_with_a_state_are_those_of_the_piece_alone():
    """The past is data: same logits, and the same gradients as a pass whose past is detached."""
    model, tokens = small(), torch.arange(20).view(2, 10)
    state = model.new_state(2, 10)
    model.hidden(tokens[:, :6], state)
    assert not state.key.requires_grad
    before = State(*map(torch.clone, state))
    model(tokens[:, 6:], state).square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert got["h.0.attn.c_attn.weight"].abs().sum() > 0
    model.zero_grad()                        # one pass, in which nothing flows into the past's q, k, v
    hooks = [block.attn.c_attn.register_forward_hook(lambda module, inputs, out: torch.cat(
        [out[:, :6].detach(), out[:, 6:]], 1)) for block in model.h]
    model(tokens)[:, 6:].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(got[name], parameter.grad, 1e-4, name)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    with torch.no_grad():
        full = model(tokens)
    assert_close(model(tokens[:, 6:], before), full[:, 6:], 1e-5, "logits")
    assert_close(before.key, state.key, 1e-6, "cache")


def test_state_saves_loads_clones_and_views(model, tmp_path):
    state = model.new_state(2, 12)
    with torch.no_grad():
        model.hidden(torch.tensor([[1, 2, 3], [4, 5, 6]]), state)
    save_file(state._asdict(), tmp_path / "memory")
    again = State(**load_file(tmp_path / "memory"))
    for name, tensor in state._asdict().items():
        assert torch.equal(tensor, again._asdict()[name])
    copy, view = State(*map(torch.clone, state)), state._make(t[1:2] for t in state)
    view.position.add_(5)
    assert state.position.tolist() == [3, 8] and copy.position.tolist() == [3, 3]
    assert state.capacity == 12 and model.new_state(1, 1000).capacity == model.config.context


def test_too_many_tokens_are_an_error_with_both_numbers(model):
    with pytest.raises(ValueError, match=r"49.*48"):
        model(torch.zeros(1, 49, dtype=torch.int64))
    state = model.new_state(1, 5)
    with pytest.raises(ValueError, match=r"6.*5"):
        model(torch.zeros(1, 6, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="rows"):
        model(torch.zeros(2, 3, dtype=torch.int64), state)


# --- reading and writing ---

def test_save_then_load_gives_the_same_bits_and_config(golden, tmp_path):
    for source in (*LAYOUTS, "gpt2/nanogpt", "gpt2/nanogpt/ckpt_nobias_compiled.pt"):
        model = GPT.from_pretrained(golden / source)
        model.save_pretrained(tmp_path / "copy")
        again = GPT.from_pretrained(tmp_path / "copy")
        tokens = torch.arange(20)[None]
        assert torch.equal(model(tokens), again(tokens)), source
        assert again.config == replace(model.config, bias=True)
        assert [p.name for p in (tmp_path / "copy").glob("*.part")] == []


def test_untied_head_and_dtype_survive(tmp_path):
    model = small(tie_word_embeddings=False).bfloat16()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert GPT.from_pretrained(tmp_path, dtype=torch.float32).wte.weight.dtype == torch.float32


def test_saved_models_open_in_transformers_to_the_same_logits(golden, tmp_path):
    transformers = pytest.importorskip("transformers")
    for source in ("gpt2", "gpt2/nanogpt/ckpt_nobias_compiled.pt"):
        model = GPT.from_pretrained(golden / source)
        model.save_pretrained(tmp_path / "copy")
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "copy").eval()
        tokens = torch.arange(20)[None]
        assert_close(model(tokens), theirs(tokens).logits, 1e-5, source)


def test_what_is_written_states_the_model_in_the_words_of_transformers(tmp_path):
    from safetensors import safe_open
    config = GPTConfig(7, 6, 4, 1, 2, 5, bias=False, bos_token_id=1, eos_token_id=[2, 3])
    GPT(config).bfloat16().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "torch_dtype": "bfloat16",
        "dtype": "bfloat16", "vocab_size": 7, "n_positions": 6, "n_ctx": 6, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 5,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bias": True,
        "tie_word_embeddings": True, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
        "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as content:
        assert content.metadata() == {"format": "pt"}
        shapes = {name: content.get_slice(name).get_shape() for name in content.keys()}
        assert not content.get_tensor("h.0.ln_1.bias").any()            # written, as 0
    assert shapes == {
        "wte.weight": [7, 4], "wpe.weight": [6, 4], "ln_f.weight": [4], "ln_f.bias": [4],
        **{f"h.0.ln_{i}.{kind}": [4] for i in (1, 2) for kind in ("weight", "bias")},
        "h.0.attn.c_attn.weight": [4, 12], "h.0.attn.c_attn.bias": [12],
        "h.0.attn.c_proj.weight": [4, 4], "h.0.attn.c_proj.bias": [4],
        "h.0.mlp.c_fc.weight": [4, 5], "h.0.mlp.c_fc.bias": [5],
        "h.0.mlp.c_proj.weight": [5, 4], "h.0.mlp.c_proj.bias": [4]}


def test_nanogpt_states_sizes_and_dropout_and_its_version_the_gelu(tmp_path):
    model = small(activation_function="gelu", n_inner=128)
    stated = dict(n_layer=2, n_head=1, n_embd=32, block_size=40)
    for more, changes in (
            (dict(bias=True, dropout=0.2, vocab_size=61), dict(embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)),
            (dict(bias=True, vocab_size=61), {}), (dict(bias=True), {}),
            (dict(vocab_size=61), dict(activation_function="gelu_new"))):
        tensors = {f"_orig_mod.transformer.{n}": t for n, t in model.state_dict().items()}
        torch.save({"model": tensors, "model_args": {**stated, **more}}, tmp_path / "ckpt.pt")
        config, found = read_nanogpt(tmp_path / "ckpt.pt")
        assert config == replace(model.config, **changes), more
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in found)
        assert GPT.from_pretrained(tmp_path).config == config


def test_buffers_of_masks_are_left_out_and_matrices_of_blocks_are_turned():
    stored = {"transformer.h.0.attn.bias": torch.ones(1, 1, 3, 3), "h.0.attn.masked_bias": torch.tensor(0.),
              "h.0.attn.c_attn.bias": torch.ones(6), "h.0.attn.c_attn.weight": torch.rand(2, 6),
              "wte.weight": torch.rand(5, 2)}
    for transposed in (True, False):
        found = dict(to_ours(stored.items(), transposed))
        assert [*found] == ["h.0.attn.c_attn.bias", "h.0.attn.c_attn.weight", "wte.weight"]
        want = stored["h.0.attn.c_attn.weight"]
        assert torch.equal(found["h.0.attn.c_attn.weight"], want.t() if transposed else want)
        assert all(t.is_contiguous() for t in found.values())
        assert found["wte.weight"] is stored["wte.weight"]


def test_overrides_change_the_config_and_unknown_ones_are_refused(golden):
    assert GPT.from_pretrained(golden / "gpt2", resid_pdrop=0.3).config.resid_pdrop == 0.3
    with pytest.raises(ValueError, match="n_heads"):
        load_checkpoint(golden / "gpt2", n_heads=3)
    with pytest.raises(ValueError, match="n_embd.*'8'"):
        load_checkpoint(golden / "gpt2", n_embd="8")


def damaged(golden, folder, kind):
    """A copy of the golden with one fault."""
    shutil.copytree(golden / "gpt2", folder, ignore=shutil.ignore_patterns("nanogpt", "bin", "prefixed"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    index = folder / "model.safetensors.index.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "no config":
        config.unlink()
    elif kind == "config is a list":
        config.write_text("[1]")
    elif kind == "other sizes":
        config.write_text(config.read_text().replace('"n_embd": 30', '"n_embd": 33'))
    elif kind == "other model":
        config.write_text(config.read_text().replace('"gpt2"', '"bert"'))
    elif kind == "inverse layer":
        config.write_text(json.dumps({**json.loads(config.read_text()),
                                      "scale_attn_by_inverse_layer_idx": True}))
    elif kind == "outside":
        index.write_text('{"weight_map": {"wte.weight": "../model.safetensors"}}')
    elif kind == "absent shard":
        index.write_text('{"weight_map": {"wte.weight": "model-1.safetensors"}}')
    elif kind == "index without map":
        index.write_text('{"metadata": {}}')
    elif kind == "name not in shard":
        index.write_text('{"weight_map": {"wte.weights": "model.safetensors"}}')
    elif kind == "no weights":
        weights.unlink()
    return folder


@pytest.mark.parametrize("kind", [
    "truncated", "pointer", "empty", "no config", "config is a list", "other sizes", "other model",
    "inverse layer", "outside", "absent shard", "index without map", "name not in shard", "no weights"])
def test_a_damaged_checkpoint_is_one_clear_line(golden, tmp_path, kind):
    with pytest.raises((ValueError, OSError)) as caught:
        load_checkpoint(damaged(golden, tmp_path / "copy", kind))
    assert "\n" not in str(caught.value) and 20 < len(str(caught.value)) < 600


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))
    torch.save({"wte.weight": Evil()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="damaged, or no file of tensors"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("source, file", [
    ("gpt2", "model.safetensors"), ("gpt2/bin", "pytorch_model.bin"), ("gpt2/nanogpt", "ckpt.pt")])
def test_random_damage_to_a_file_raises_nothing_else(golden, tmp_path, source, file):
    rng, intact = random.Random(0), (golden / source / file).read_bytes()
    if file != "ckpt.pt":
        shutil.copy(golden / source / "config.json", tmp_path)
    for _ in range(30):
        data = bytearray(intact)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), rng.choice((50, 2000, 10**9))))] = rng.randrange(256)
        (tmp_path / file).write_bytes(bytes(data[:rng.choice((len(data), rng.randrange(len(data))))]))
        try:
            load_checkpoint(tmp_path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)


def test_the_index_decides_and_a_second_save_beside_it_is_an_error(golden, tmp_path):
    model = GPT.from_pretrained(golden / "gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names, places = sorted(tensors), {}
    for part, half in ((1, names[::2]), (2, names[1::2])):
        places |= {name: f"model-{part}.safetensors" for name in half}
        save_file({name: tensors[name] for name in half}, tmp_path / f"model-{part}.safetensors")
    save_file({name: torch.zeros_like(tensors[name]) for name in names}, tmp_path / "model-0.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match="remove the older save"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tokens = torch.arange(20)[None]
    assert torch.equal(load_checkpoint(tmp_path)(tokens), model(tokens))


def test_old_bin_files_that_are_no_zip_load(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert dict(read_tensors(tmp_path))["a"].tolist() == [0, 1, 2]


# --- the file alone, and its command ---

def test_the_file_alone_builds_trains_saves_loads_and_generates(root, tmp_path):
    shutil.copy(root / "gpt.py", tmp_path)
    (tmp_path / "use.py").write_text("""
import torch, gpt
model = gpt.GPT(gpt.GPTConfig.sized(1, 16, 20, 12))
tokens = torch.arange(12)[None] % 20
loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
loss.backward()
model.save_pretrained("saved")
print(len(gpt.GPT.from_pretrained("saved").generate([[1, 2]], 5, seed=0)[0]))
""")
    done = run("use.py", cwd=tmp_path)
    assert done.stdout == "5\n", done.stderr


def test_greedy_generation_equals_recomputing_everything():
    model = small()
    prompts = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3, 5], [8, 9]]
    want = [continuation(model, prompt, 12) for prompt in prompts]
    assert model.generate(prompts, 12, temperature=0) == want
