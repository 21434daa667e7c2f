"""glm4.py against the official code of three generations, and against itself."""
import json
import random
import shutil
from dataclasses import replace

from pathlib import Path

import pytest
import torch
from helpers import (assert_close, assert_gradient, continuation, cross_entropy, digest, published,
                     run)
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import glm4
from glm4 import (GLM4, SIZES, GLM4Config, State, dequantised, inverse_frequency,
                  to_config, to_ours)
from train import load_checkpoint

SETS = ("chatglm3", "glm4", "glm4_hf", "glm4_0414")
every_set = pytest.mark.parametrize("name", SETS)


@pytest.fixture(scope="module")
def golden(golden, tmp_path_factory):
    """The goldens; glm4_hf is the model of glm4 and gets its weights from there."""
    folder = tmp_path_factory.mktemp("golden")
    for source in filter(Path.is_dir, golden.glob("*glm*")):            # "*/" finds files before 3.11
        shutil.copytree(source, folder / source.name)
    GLM4.from_pretrained(folder / "glm4").save_pretrained(folder / "new")
    shutil.move(folder / "new/model.safetensors", folder / "glm4_hf")
    return folder


@pytest.fixture(scope="module")
def load(golden):
    """load(name) -> the model of a set and what the official code made of it."""
    return lambda name: (GLM4.from_pretrained(golden / name), published(golden / name))


def small(**changes):
    torch.manual_seed(0)
    return GLM4(replace(GLM4Config.sized(2, 32, 61, 40), **changes)).eval()


def edited(golden, name, folder, **changes):
    """A copy of a golden checkpoint whose config.json says something else."""
    shutil.copytree(golden / name, folder, ignore=shutil.ignore_patterns("expected*", "about*"))
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **changes}))
    return folder


# --- goldens ---

@every_set
def test_each_layer_and_the_logits_equal_the_official_code(load, name):
    model, expected = load(name)
    seen = [model.model.embed_tokens(expected["tokens"])]
    for block in model.model.layers:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(expected["tokens"])
    theirs = expected if name != "glm4_hf" else load("glm4")[1]         # the same model
    for i, hidden in enumerate(seen):
        assert_close(hidden, theirs[f"hidden.{i}"], 1e-5, f"{name}: the stream after layer {i}")
    assert f"hidden.{len(seen)}" not in theirs and len(seen) == 4
    assert_close(logits, expected["logits"], 1e-5, name)


@pytest.mark.parametrize("name", ("glm4", "glm4_0414"))
def test_float64_logits_equal_the_official_code_in_float64(load, name):
    model, expected = load(name)
    logits = model.double()(expected["tokens"])
    assert_close(logits[:, -8:], expected["logits_f64_pure"], 1e-12, name)


@pytest.mark.parametrize("name", ("chatglm3", "glm4", "glm4_0414"))
def test_loss_and_gradients_equal_the_official_code(load, name):
    model, expected = load(name)
    loss = cross_entropy(model, expected["tokens"])
    loss.backward()
    assert_close(loss, expected["loss"], 1e-6, "loss")
    if name == "glm4_0414":                  # transformers gives the pad row no gradient
        model.model.embed_tokens.weight.grad[model.config.pad_token_id] = 0
    told = {key.removeprefix("gradnorm.") for key in expected if key.startswith("gradnorm.")}
    assert told == {key for key, _ in model.named_parameters()}
    for key, parameter in model.named_parameters():
        assert_gradient(parameter.grad, expected, key, 1e-5)


@every_set
def test_greedy_ids_equal_the_official_code(load, name):
    model, expected = load(name)
    new = model.generate(expected["gen.prompt"].tolist(), 16, temperature=0, stop=())
    assert new == [expected["gen.ids"].tolist()]


@every_set
def test_rows_of_different_lengths_equal_the_padded_batch_of_the_official_code(load, name):
    model, expected = load(name)
    mask = expected["pad.attention_mask"].bool()
    prompts = [ids[keep].tolist() for ids, keep in zip(expected["pad.tokens"], mask)]
    assert len({len(prompt) for prompt in prompts}) > 1
    new = model.generate(prompts, 16, temperature=0, stop=())
    assert new == expected["pad.generated"].tolist()
    for prompt, logits in zip(prompts, expected["pad.last_logits"]):
        assert_close(model(torch.tensor([prompt]))[0, -1], logits, 2e-5, "row")


def variants(golden):
    for name in SETS:
        for key in sorted(published(golden / name)):
            if key.startswith("variant."):
                field, value = key.split(".")[1].rsplit("_", 1) if "1e-05" not in key else (
                    "layernorm_epsilon", "1e-05")
                yield name, field, json.loads(value), published(golden / name)[key]


def test_each_config_field_acts_as_in_the_official_code_or_is_refused_by_name(golden, tmp_path):
    seen = set()
    for i, (name, field, value, logits) in enumerate(variants(golden)):
        folder = edited(golden, name, tmp_path / str(i), **{field: value})
        ours = GLM4.from_pretrained(folder)(published(golden / name)["tokens"])
        assert_close(ours[:, -8:], logits, 1e-5, f"{name} {field}")
        seen.add(field)
    assert seen == {"apply_query_key_layer_scaling", "rope_ratio", "layernorm_epsilon",
                    "rope_theta"}
    refused = "apply_residual_connection_post_layernorm"
    for name in ("chatglm3", "glm4"):
        with pytest.raises(ValueError, match=f"{refused} is True"):
            load_checkpoint(edited(golden, name, tmp_path / name, **{refused: True}))


def test_the_two_layouts_of_one_model_hold_the_same_tensors(load):
    (original, _), (converted, _) = load("glm4"), load("glm4_hf")
    assert original.config == converted.config
    for key, tensor in original.state_dict().items():
        assert torch.equal(tensor, converted.state_dict()[key]), key


def test_the_weights_put_together_for_these_tests_are_the_converted_ones(golden):
    """By digest: the file itself would be the weights of glm4 again."""
    [(file, told)] = json.loads((golden / "glm4_hf/digests.json").read_text()).items()
    assert digest(load_file(golden / "glm4_hf" / file)) == told


def test_the_wrong_base_of_published_hf_configs_can_be_overridden(golden, load, tmp_path):
    """Their rope_theta is 10000; an override makes the model that was trained."""
    folder = edited(golden, "glm4_hf", tmp_path / "copy", rope_theta=10000.0)
    expected = published(golden / "glm4_hf")
    obeyed, right = GLM4.from_pretrained(folder), GLM4.from_pretrained(folder, rope_theta=5e6)
    logits = obeyed(expected["tokens"])
    assert_close(logits[:, -8:], expected["variant.rope_theta_10000.logits"], 1e-5)
    assert_close(right(expected["tokens"]), expected["logits"], 1e-5)


def frequencies(config, R=None, over=None, by=1.0, base=None):
    """With one of the mistakes that ports have made."""
    R = R or config.head_dim // 2
    return (base or config.rope_theta) ** (-torch.arange(0, R, 2) / (over or R)) / by


def half_split(x, cos, sin):
    a, b = x[..., :2 * cos.shape[-1]].chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * cos.shape[-1]:]), -1)


ROTATE = glm4.rotate
MISTAKES = {
    "pairs are halves": half_split,
    "the second half is turned": lambda x, c, s: ROTATE(x.flip(-1), c, s).flip(-1),
    "all channels are turned": lambda config: frequencies(config, R=config.head_dim),
    "the exponent runs over D": lambda config: frequencies(config, over=config.head_dim),
    "rope_ratio is ignored": lambda config: frequencies(config, base=10000.0),
    "rope_ratio stretches positions": lambda config: frequencies(config, base=10000.0, by=500.0),
}


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_the_goldens_see_the_mistakes_that_ports_have_made_in_rope(load, monkeypatch, mistake):
    model, expected = load("glm4")
    if mistake in ("pairs are halves", "the second half is turned"):
        monkeypatch.setattr(glm4, "rotate", MISTAKES[mistake])
    else:
        model.inverse_frequency = MISTAKES.get(mistake, frequencies)(model.config)
    worst = (model(expected["tokens"]) - expected["logits"]).abs().max()
    assert worst < 1e-4 if mistake is None else worst > 1


@pytest.mark.parametrize("name, change, least", [
    ("glm4", dict(rms_norm_eps=1e-6), 0.05), ("glm4", dict(rms_norm_eps=1e-5), 0.5),
    ("glm4", "gate and up", 1), ("glm4", "tiled groups", 1), ("glm4", "no bias", 1),
    ("glm4_0414", "no sandwich", 1)])
def test_the_goldens_see_other_mistakes(golden, load, monkeypatch, name, change, least):
    model, expected = load(name)
    attention = F.scaled_dot_product_attention
    if isinstance(change, dict):
        model = GLM4.from_pretrained(golden / name, **change)
    for block in model.model.layers:
        if change == "gate and up":
            weight = block.mlp.gate_up_proj.weight.data
            weight.copy_(torch.cat(weight.chunk(2)[::-1]))
        elif change == "no bias":
            block.self_attn.q_proj.bias.data.zero_()
        elif change == "no sandwich":
            block.post_self_attn_layernorm = block.post_mlp_layernorm = torch.nn.Identity()
    if change == "tiled groups":
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **rest: attention(
            q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1), is_causal=True))
    assert (model(expected["tokens"]) - expected["logits"]).abs().max() > least


# --- positions ---

def test_angles_at_long_positions_are_those_of_the_official_code():
    """Bit for bit: at a million tokens another order of fp32 products is another model."""
    positions = torch.tensor([[0, 1, 8191, 131071, 524287, 1048575]])
    for name in ("chatglm3-6b", "chatglm3-6b-32k", "glm-4-9b-chat", "glm-4-9b-chat-1m"):
        config = SIZES[name]
        base, n_elem = config.rope_theta, 64
        theta = 1.0 / (base ** (torch.arange(0, n_elem, 2, dtype=torch.float) / n_elem))
        want = torch.outer(positions[0].float(), theta).float()
        angles = positions[0, :, None] * inverse_frequency(config)
        assert angles.shape == (6, 32) and angles.dtype == torch.float32
        assert torch.equal(angles.cos(), want.cos()) and torch.equal(angles.sin(), want.sin())
        exact = positions[0].double().outer(base ** (-torch.arange(0, 64, 2).double() / 64))
        wide = positions[0, :, None] * inverse_frequency(config, torch.float64)
        assert (wide.cos() - exact.cos()).abs().max() < 1e-8
        assert (angles.cos() - exact.cos()).abs().max() < 0.2


def test_long_sequences_equal_transformers(golden, load):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Glm4ForCausalLM.from_pretrained(golden / "glm4_0414").eval()
    model, _ = load("glm4_0414")
    tokens = torch.randint(140, (1, 3000), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, state = model(tokens), model.new_state(1, 3000)
        assert_close(ours[:, -50:], theirs(tokens).logits[:, -50:], 1e-4, "3000 ids")
        model.hidden(tokens[:, :2500], state)
        assert_close(model(tokens[:, 2500:], state), ours[:, 2500:], 1e-4, "in pieces")


def test_transformers_at_position_20000_has_the_same_angles(golden):
    modeling = pytest.importorskip("transformers.models.glm4.modeling_glm4")
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(golden / "glm4_0414")
    positions = torch.tensor([[0, 7, 20000, 32767]])
    theirs, _ = modeling.Glm4RotaryEmbedding(config)(torch.zeros(1), positions)
    stated = json.loads((golden / "glm4_0414/config.json").read_text())
    ours = (positions[0, :, None] * inverse_frequency(to_config(stated))).cos()
    assert torch.equal(theirs[0, :, :ours.shape[-1]], ours)


@pytest.mark.parametrize("factor", (0.25, 1.0))
def test_other_partial_rotary_factors_equal_transformers(tmp_path, factor):
    """glm-edge turns whole heads, has no biases and ties its head."""
    transformers = pytest.importorskip("transformers")
    model = small(partial_rotary_factor=factor, attention_bias=False, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    theirs = transformers.GlmForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.arange(40)[None]
    assert_close(model(tokens), theirs(tokens).logits, 1e-5)
    assert torch.equal(GLM4.from_pretrained(tmp_path)(tokens), model(tokens))


# --- precisions ---

def test_the_norms_in_bf16_round_once_bit_for_bit():
    """In fp32 with the weight, and then rounded, as theirs: Llama's rounds before the weight."""
    for sandwich in (False, True):
        model = small(rms_norm_eps=1e-3, sandwich_norms=sandwich).bfloat16()
        norms = [module for module in model.modules() if isinstance(module, torch.nn.RMSNorm)]
        assert len(norms) == (9 if sandwich else 5) and {norm.eps for norm in norms} == {1e-3}
        for norm in norms:
            norm.weight.data.normal_()
            x = torch.randn(3, 7, 32).bfloat16()
            normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-3)
            assert torch.equal(norm(x), (norm.weight.float() * normed).bfloat16())
            assert not torch.equal(norm(x), normed.bfloat16() * norm.weight)


def test_angles_at_position_1000_are_exact_with_bf16_weights():
    model, seen = small(max_position_embeddings=1200).bfloat16(), []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    state = model.new_state(2, 1003)
    state.position.copy_(torch.tensor([1000, 7]))
    with torch.no_grad():
        model(torch.zeros(2, 3, dtype=torch.int64), state)
    [(cos, sin)] = seen
    angles = torch.tensor([[1000, 1001, 1002], [7, 8, 9]])[:, None, :, None] * inverse_frequency(model.config)
    assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())
    assert cos.shape == (2, 1, 3, model.config.head_dim // 4) and cos.dtype == torch.float32
    R, x = model.config.head_dim // 2, torch.randn(2, 5, 3, model.config.head_dim).bfloat16()
    a, b = x.double()[..., 0:R:2], x.double()[..., 1:R:2]
    exact = torch.stack((a * cos.double() - b * sin.double(), a * sin.double() + b * cos.double()), -1).flatten(-2)
    got = glm4.rotate(x, cos, sin)
    assert got.dtype == torch.bfloat16 and torch.equal(got[..., R:], x[..., R:])
    assert (got[..., :R].double() - exact).abs().max() <= exact.abs().max() / 256

def test_half_precision_stays_near_fp32(load):
    model, expected = load("glm4")
    tokens = expected["tokens"]
    with torch.no_grad():
        full = model(tokens).log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(tokens).float().log_softmax(-1)
        model = model.bfloat16()
        whole = model(tokens)
        assert whole.dtype == torch.bfloat16
        state = model.new_state(2, 24)
        assert state.key.dtype == torch.bfloat16
        pieces = torch.cat([model(piece, state) for piece in tokens.split([5, 1, 18], dim=1)], 1)
    for logits in (mixed, whole.float().log_softmax(-1), pieces.float().log_softmax(-1)):
        divergence = (full.exp() * (full - logits)).sum(-1)             # KL, in nats
        assert 0 < divergence.mean() < 1e-3 and divergence.max() < 2e-2


def test_autocast_works_with_a_state_and_keeps_fp32_caches():
    model, tokens = small(sandwich_norms=True), torch.arange(20).view(2, 10)
    state = model.new_state(2, 10)
    with torch.autocast("cpu", torch.bfloat16):
        for piece in tokens.split([6, 4], dim=1):
            logits = model(piece, state)
        logits.float().square().mean().backward()
    assert state.key.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_hidden_compiles_in_one_graph():
    model, tokens = small(sandwich_norms=True), torch.arange(10)[None]
    compiled = torch.compile(model.hidden, backend="eager", fullgraph=True)
    state = model.new_state(1, 10)
    with torch.no_grad():
        assert torch.equal(compiled(tokens), model.hidden(tokens))
        assert_close(compiled(tokens, state), model.hidden(tokens), 1e-5)
    assert int(state.position) == 10


# --- sizes and initialisation ---

@pytest.mark.parametrize("name, count, tensors", [
    ("chatglm3-6b", 6_243_584_000, 311), ("chatglm3-6b-32k", 6_243_584_000, 311),
    ("glm-4-9b", 9_399_951_360, 443), ("glm-4-9b-chat", 9_399_951_360, 443),
    ("glm-4-9b-chat-1m", 9_483_857_920, 443), ("glm-4-9b-0414", 9_400_279_040, 523),
    ("glm-4-32b-0414", 32_566_081_536, 613)])
def test_published_sizes_have_the_published_number_of_parameters(name, count, tensors):
    with torch.device("meta"):
        parameters = list(GLM4(SIZES[name]).parameters())
    assert (sum(p.numel() for p in parameters), len(parameters)) == (count, tensors)


def test_fields_that_an_original_config_leaves_out_have_the_defaults_of_its_code():
    """Those that the published files state are all needed: their code has no useful defaults for them."""
    least = dict(model_type="chatglm", padded_vocab_size=50, ffn_hidden_size=11, num_layers=3, multi_query_group_num=2,
                 kv_channels=8, seq_length=40, layernorm_epsilon=1e-5, hidden_size=32, num_attention_heads=4)
    plain = GLM4Config(40, 32, 3, 4, 2, 8, 11, 50, 1e-5, attention_bias=False)
    for stated, changes in (
            (dict(add_qkv_bias=False), {}), (dict(add_qkv_bias=True), dict(attention_bias=True)), ({}, {}),
            (dict(rope_ratio=50), dict(rope_theta=500000.0)), (dict(rope_ratio=None), {}),
            (dict(eos_token_id=[1, 2], pad_token_id=3), dict(eos_token_id=[1, 2], pad_token_id=3)),
            (dict(tie_word_embeddings=True), dict(tie_word_embeddings=True)), (dict(pre_seq_len=None), {})):
        assert to_config({**least, **stated}) == replace(plain, **changes), stated
    for name in least:
        if name not in ("hidden_size", "num_attention_heads"):
            with pytest.raises(KeyError):
                to_config({key: value for key, value in least.items() if key != name})
    for kind in ("glm", "glm4"):
        assert to_config(dict(model_type=kind)) == GLM4Config(sandwich_norms=kind == "glm4")
        assert to_config(dict(model_type=kind, rope_theta=7.0, rope_parameters=dict(
            rope_theta=8.0, partial_rotary_factor=1.0))) == GLM4Config(
                sandwich_norms=kind == "glm4", rope_theta=8.0, partial_rotary_factor=1.0)


def test_fields_that_a_config_leaves_out_have_the_defaults_of_transformers():
    transformers = pytest.importorskip("transformers")
    for theirs in (transformers.GlmConfig(), transformers.Glm4Config()):
        stated, ours = {**theirs.to_dict(), **theirs.rope_parameters}, GLM4Config()
        for field, value in vars(ours).items():
            if field != "sandwich_norms" and not field.endswith("_id"):
                assert value == stated[field], field


def test_the_sizes_state_what_the_model_cards_state():
    shape = {name: (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
                    c.intermediate_size, c.vocab_size, c.attention_bias, c.sandwich_norms) for name, c in SIZES.items()}
    glm4_9b = (4096, 40, 32, 2, 13696, 151552, True, False)
    assert shape == {
        **dict.fromkeys(("chatglm3-6b", "chatglm3-6b-32k"), (4096, 28, 32, 2, 13696, 65024, True, False)),
        **dict.fromkeys(("glm-4-9b", "glm-4-9b-chat"), glm4_9b),
        "glm-4-9b-chat-1m": (4096, 40, 32, 4, 13696, 151552, True, False), "glm-4-9b-0414": (*glm4_9b[:-1], True),
        "glm-4-32b-0414": (6144, 61, 48, 2, 23040, 151552, False, True)}
    for name, c in SIZES.items():
        assert (c.head_dim, c.partial_rotary_factor, c.tie_word_embeddings, c.bos_token_id) == (128, 0.5, False, None)
        assert (c.eos_token_id, c.pad_token_id) == (
            (2, 0) if name.startswith("chatglm3") else ([151329, 151336, 151338], 151329))
    told = {name: (c.context, c.rope_theta, c.rms_norm_eps) for name, c in SIZES.items()}
    assert told == {
        "chatglm3-6b": (8192, 1e4, 1e-5), "chatglm3-6b-32k": (32768, 5e5, 1e-5),
        "glm-4-9b": (8192, 1e4, 1.5625e-07), "glm-4-9b-chat": (131072, 5e6, 1.5625e-07),
        "glm-4-9b-chat-1m": (1048576, 1e8, 1.5625e-07), "glm-4-9b-0414": (32768, 1e4, 1e-5),
        "glm-4-32b-0414": (32768, 1e4, 1e-5)}


@pytest.mark.parametrize("width, heads, size, wide", [
    (8, 2, 4, 32), (32, 2, 16, 96), (96, 2, 48, 320), (128, 2, 64, 416), (384, 4, 96, 1280), (1000, 8, 124, 3328),
    (4096, 32, 128, 13696)])
def test_sized_has_the_proportions_of_9b(width, heads, size, wide):
    assert GLM4Config.sized(3, width, 99, 50) == GLM4Config(50, width, 3, heads, 2, size, wide, 99)


@pytest.mark.parametrize("width", (8, 30, 32, 96, 128, 384, 1000, 4096, 6144))
def test_any_width_has_a_config_with_the_proportions_of_the_authors(width):
    config = GLM4Config.sized(2, width, 61, 40)
    heads, size = config.num_attention_heads, config.head_dim
    assert config.context == 40 and config.num_key_value_heads == 2
    assert size <= 192 and abs(heads * size - width) <= 4 * heads
    if width == 4096:
        assert (heads, size, config.intermediate_size) == (32, 128, 13696)


def test_initial_values_are_those_of_the_published_configs():
    torch.manual_seed(0)
    model = GLM4(replace(GLM4Config.sized(3, 128, 512, 256), sandwich_norms=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            want = 0.02 / 6 ** 0.5 if adds else 0.02                    # 2 * 3 of them add up
            assert parameter.std().item() == pytest.approx(want, rel=0.05), name
    assert sum("norm" in name for name, _ in model.named_parameters()) == 3 * 4 + 1


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = small(sandwich_norms=True)
    groups = model.parameter_groups(0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("num_hidden_layers", -1), ("num_attention_heads", 5), ("hidden_size", 0),
    ("head_dim", 6), ("partial_rotary_factor", 1.5), ("partial_rotary_factor", 0.0),
    ("rms_norm_eps", -1.0), ("rope_theta", float("nan")), ("rope_theta", float("inf")),
    ("num_key_value_heads", 0), ("intermediate_size", 0), ("max_position_embeddings", 0)])
def test_an_impossible_config_names_the_field(field, value):
    named = "partial_rotary_factor" if field == "head_dim" else field
    with pytest.raises(ValueError, match=named):
        replace(GLM4Config.sized(2, 32, 61, 40), **{field: value})


# --- the state ---

@every_set
def test_a_cached_pass_in_pieces_equals_one_pass(load, name):
    model, expected = load(name)
    tokens = expected["tokens"]
    state = model.new_state(len(tokens), 30)
    with torch.no_grad():
        pieces = [model(piece, state) for piece in tokens.split([5, 1, 11, 7], dim=1)]
    # Other lengths, other orders of fp32 sums: 1e-5 relative holds with any number of threads.
    assert_close(torch.cat(pieces, 1), model(tokens), 1e-5, "logits")
    assert state.position.tolist() == [24, 24]
    assert state.key.shape == (len(tokens), 3, 2, 30, 16)


def test_going_on_from_a_state_equals_one_long_prompt(load):
    model, ids = load("glm4_0414")[0], []
    state = model.new_state(1, 60)
    for turn in ([3, 1, 4], [1, 5, 9, 2], [6]):
        ids += turn
        [new] = model.generate([ids[int(state.position):]], 6, state=state, temperature=0, stop=())
        assert new == continuation(model, ids, 6)
        ids += new


def test_gradients_with_a_state_are_those_of_the_piece_alone():
    """The past is data: same logits as one pass, and gradients that end where the piece begins."""
    model, tokens = small(), torch.arange(20).view(2, 10)
    state = model.new_state(2, 10)
    model.hidden(tokens[:, :6], state)
    assert not state.key.requires_grad
    before = State(*map(torch.clone, state))
    model(tokens[:, 6:], state).square().sum().backward()
    got = model.model.embed_tokens.weight.grad
    assert got[tokens[:, 6:].flatten()].abs().sum(-1).min() > 0         # the piece's own ids
    assert not got[tokens[:, :6].flatten()].any()                       # those of the past
    assert model.model.layers[0].self_attn.k_proj.weight.grad.any()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()                        # one pass, in which nothing flows into the past's q, k, v
    hooks = [getattr(block.self_attn, f"{x}_proj").register_forward_hook(lambda module, inputs, out: torch.cat(
        [out[:, :6].detach(), out[:, 6:]], 1)) for block in model.model.layers for x in "qkv"]
    model(tokens)[:, 6:].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(got[name], parameter.grad, 1e-4, name)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        full = model(tokens)
    assert_close(model(tokens[:, 6:], before), full[:, 6:], 1e-5, "logits")


def test_state_saves_and_loads(tmp_path):
    model = small()
    state = model.new_state(2, 12)
    with torch.no_grad():
        model.hidden(torch.tensor([[1, 2, 3], [4, 5, 6]]), state)
    save_file(state._asdict(), tmp_path / "memory")
    again = State(**load_file(tmp_path / "memory"))
    for name, tensor in state._asdict().items():
        assert torch.equal(tensor, again._asdict()[name])


def test_too_many_tokens_are_an_error_with_both_numbers():
    model = small()
    with pytest.raises(ValueError, match=r"41.*40"):
        model(torch.zeros(1, 41, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"6.*5"):
        model(torch.zeros(1, 6, dtype=torch.int64), model.new_state(1, 5))


def test_greedy_generation_equals_recomputing_everything():
    model = small(sandwich_norms=True)
    with torch.no_grad():
        for parameter in model.parameters():                            # peaked, varied
            parameter.mul_(6.0 if parameter.dim() == 2 else 1.0)
    prompts = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3, 5], [8, 9]]
    want = [continuation(model, prompt, 12) for prompt in prompts]
    assert model.generate(prompts, 12, temperature=0) == want
    assert len({tuple(row) for row in want}) > 2


# --- reading and writing ---

@pytest.mark.parametrize("sandwich", [False, True])
def test_what_is_written_states_the_model_in_the_words_of_transformers(tmp_path, sandwich):
    from safetensors import safe_open
    config = GLM4Config(9, 8, 1, 2, 1, 4, 5, 7, 1e-4, 77.0, 0.5, not sandwich, sandwich, sandwich, 1, [2, 3], 4)
    GLM4(config).bfloat16().save_pretrained(tmp_path)
    kind = "Glm4" if sandwich else "Glm"
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), "hidden_act": "silu",
        "torch_dtype": "bfloat16", "dtype": "bfloat16", "max_position_embeddings": 9, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 5, "vocab_size": 7,
        "rms_norm_eps": 1e-4, "rope_theta": 77.0, "partial_rotary_factor": 0.5, "attention_bias": not sandwich,
        "sandwich_norms": sandwich, "tie_word_embeddings": sandwich, "bos_token_id": 1, "eos_token_id": [2, 3],
        "pad_token_id": 4}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as content:
        assert content.metadata() == {"format": "pt"}
        assert ("lm_head.weight" in content.keys()) != sandwich

@every_set
def test_save_then_load_gives_the_same_bits_and_config(load, name, tmp_path):
    model, expected = load(name)
    model.save_pretrained(tmp_path)
    again = GLM4.from_pretrained(tmp_path)
    assert torch.equal(model(expected["tokens"]), again(expected["tokens"]))
    assert again.config == model.config
    assert not list(tmp_path.glob("*.part"))


@every_set
def test_saved_models_open_in_transformers_to_the_same_logits(load, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, expected = load(name)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == ("Glm4" if name == "glm4_0414" else "Glm") + "ForCausalLM"
    assert_close(model(expected["tokens"]), theirs(expected["tokens"]).logits, 1e-5, name)
    assert theirs.config.pad_token_id == model.config.pad_token_id


def test_a_model_without_ids_is_saved_with_null_not_with_ids_beyond_its_vocabulary(tmp_path):
    small().save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    assert stated["pad_token_id"] is stated["eos_token_id"] is stated["bos_token_id"] is None
    transformers = pytest.importorskip("transformers")
    assert transformers.GlmForCausalLM.from_pretrained(tmp_path).config.pad_token_id is None


def test_checkpoints_that_transformers_saves_now_load(load, tmp_path):
    """transformers 5 writes rope_parameters instead of rope_theta and partial_rotary_factor."""
    transformers = pytest.importorskip("transformers")
    for name in ("glm4", "glm4_0414"):
        model, expected = load(name)
        model.save_pretrained(tmp_path / name)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
        again = GLM4.from_pretrained(tmp_path / "theirs")
        assert torch.equal(again(expected["tokens"]), model(expected["tokens"]))
        assert replace(again.config, bos_token_id=None) == model.config
        shutil.rmtree(tmp_path / "theirs")


def test_rope_parameters_win_over_flat_fields_and_a_scaled_rope_is_refused(golden, tmp_path):
    told = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 1.0}
    folder = edited(golden, "glm4_hf", tmp_path / "new", rope_parameters=told)
    config = GLM4.from_pretrained(folder).config
    assert (config.rope_theta, config.partial_rotary_factor) == (777.0, 1.0)
    assert len(inverse_frequency(config)) == 16 / 2
    for i, (field, scaling) in enumerate((("rope_scaling", {"type": "yarn", "factor": 4.0}),
                                          ("rope_parameters", {**told, "rope_type": "yarn"}))):
        folder = edited(golden, "glm4_0414", tmp_path / str(i), **{field: scaling})
        with pytest.raises(ValueError, match="'yarn'.*take rope_scaling out"):
            load_checkpoint(folder)


def test_bin_shards_in_the_original_layout_load(golden, load, tmp_path):
    """As ChatGLM3 was first published; the dead rotary buffer may have any values."""
    folder = edited(golden, "chatglm3", tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.rotary_pos_emb.inv_freq"] = torch.full((4,), torch.nan).half()
    names = sorted(tensors)
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()
    model, expected = load("chatglm3")
    assert torch.equal(GLM4.from_pretrained(folder)(expected["tokens"]), model(expected["tokens"]))


def test_the_stored_dtype_survives_and_another_can_be_asked_for(tmp_path):
    small().bfloat16().save_pretrained(tmp_path)
    for dtype, want in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model = GLM4.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {want}


def test_overrides_change_the_config_and_unknown_ones_are_refused(golden):
    changed = GLM4.from_pretrained(golden / "glm4_hf", max_position_embeddings=99)
    assert changed.config.context == 99
    with pytest.raises(ValueError, match="rope_base"):
        load_checkpoint(golden / "glm4_hf", rope_base=3)
    for field, value in (("hidden_size", "8"), ("rope_theta", "1e4"), ("attention_bias", "false"),
                         ("num_key_value_heads", None)):
        with pytest.raises(ValueError, match=field):
            load_checkpoint(golden / "glm4_hf", **{field: value})


def test_a_tied_head_is_the_embedding(tmp_path):
    model = small(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    hidden = torch.randn(1, 2, 32)
    assert torch.equal(model.logits(hidden), hidden @ model.model.embed_tokens.weight.T)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = GLM4.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.logits(hidden), model.logits(hidden))


def test_a_head_of_its_own_wins_where_the_config_says_tied(golden, load, tmp_path):
    model, expected = load("glm4")
    again = GLM4.from_pretrained(edited(golden, "glm4", tmp_path / "c", tie_word_embeddings=True))
    assert again.config == model.config
    assert torch.equal(again(expected["tokens"]), model(expected["tokens"]))


# --- ChatGLM3's own quantisation ---

def test_int8_and_int4_weights_are_those_of_the_official_code(golden):
    stored = load_file(golden / "chatglm_quant/quant.safetensors")
    for bits, key in ((8, "int8.weight"), (4, "int4.weight_packed")):
        scale = ("x.weight_scale", stored[f"int{bits}.weight_scale"])
        for pair in ([("x.weight", stored[key]), scale], [scale, ("x.weight", stored[key])]):
            [(name, weight)] = dequantised(pair, bits)
            assert name == "x.weight" and weight.dtype == torch.float16
            assert torch.equal(weight, stored[f"int{bits}.dequantized_fp16"])
    q = torch.stack((stored["int4.weight_packed"] >> 4, stored["int4.weight_packed"] << 4 >> 4), -1)
    assert torch.equal(q.flatten(-2), stored["int4.unpacked"])


@pytest.mark.parametrize("bits", (8, 4))
def test_quantised_checkpoints_of_chatglm3_load(golden, tmp_path, bits):
    folder = edited(golden, "chatglm3", tmp_path / "copy", quantization_bit=bits)
    tensors, worth = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = worth[name] = tensor.half()
        if "layers" in name and tensor.dim() == 2:
            scale = tensor.half().abs().amax(1) / (2 ** (bits - 1) - 1)
            q = (tensor.half() / scale[:, None]).round().to(torch.int8)
            worth[name] = q * scale[:, None]
            tensors[name] = q if bits == 8 else (q[:, 0::2] << 4) | (q[:, 1::2] & 15)
            tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors")
    model = GLM4.from_pretrained(folder)
    read = {name.removeprefix("transformer."): tensor for name, tensor in worth.items()}     # as read_tensors
    for name, tensor in to_ours(read.items(), model.config):
        assert torch.equal(model.state_dict()[name], tensor), name
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    save_file({**tensors, f"{name}_scale": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"dense_4h_to_h.weight is .* its scales are \[3\]"):
        load_checkpoint(folder)
    del tensors[f"{name}_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj"):
        load_checkpoint(folder)


# --- what is refused ---

@pytest.mark.parametrize("name, change, words", [
    ("chatglm3", dict(rmsnorm=False), "rmsnorm is False"),
    ("chatglm3", dict(post_layer_norm=False), "post_layer_norm is False"),
    ("chatglm3", dict(add_bias_linear=True), "add_bias_linear is True"),
    ("chatglm3", dict(multi_query_attention=False), "multi_query_attention is False"),
    ("chatglm3", dict(pre_seq_len=128), "pre_seq_len is 128"),
    ("glm4", dict(vision_config={"a": 1}), "vision_config"),
    ("glm4", dict(rope_ratio="500"), "does not fit"),
    ("glm4_hf", dict(quantization_config={"bits": 4}), "quantization_config"),
    ("glm4_hf", dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    ("glm4_hf", dict(model_type="glm4_moe"), "model_type 'glm4_moe'"),
    ("chatglm3", dict(padded_vocab_size=None, inner_hidden_size=80), "padded_vocab_size"),
    ("chatglm3", dict(multi_query_group_num=1), "layers.0.self_attn.v_proj"),
    ("glm4_0414", dict(model_type="glm"), "post_mlp_layernorm"),
    ("glm4_hf", dict(model_type="glm4"), "post_mlp_layernorm"),
    ("glm4_hf", dict(attention_bias=False), "q_proj.bias"),
    ("glm4_hf", dict(head_dim=12), "size mismatch")])
def test_configs_of_other_models_are_refused_by_name(golden, tmp_path, name, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_checkpoint(edited(golden, name, tmp_path / "copy", **change))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_flags_without_effect_are_ignored(golden, load, tmp_path):
    folder = edited(golden, "glm4", tmp_path / "copy", original_rope=False, use_cache=False,
                    attention_softmax_in_fp32=False, bias_dropout_fusion=False)
    model, expected = load("glm4")
    assert torch.equal(GLM4.from_pretrained(folder)(expected["tokens"]), model(expected["tokens"]))


def test_random_damage_to_a_checkpoint_raises_nothing_else(golden, tmp_path):
    rng, folder = random.Random(0), edited(golden, "chatglm3", tmp_path / "copy")
    odd = [None, -1, 0, 1.5, 1e30, True, "x", [], [1], {}, {"a": 1}]
    stated = json.loads((folder / "config.json").read_text())
    for _ in range(150):
        changed = {**stated, rng.choice([*stated]): rng.choice(odd)}
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            load_checkpoint(folder)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 600, changed


# --- the file alone, and its command ---

def test_the_file_alone_builds_trains_saves_loads_and_generates(root, tmp_path):
    shutil.copy(root / "glm4.py", tmp_path)
    (tmp_path / "use.py").write_text("""
import torch, glm4
model = glm4.GLM4(glm4.GLM4Config.sized(1, 16, 20, 12))
tokens = torch.arange(12)[None] % 20
loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
loss.backward()
model.save_pretrained("saved")
print(len(glm4.GLM4.from_pretrained("saved").generate([[1, 2]], 5, seed=0)[0]))
""")
    done = run("use.py", cwd=tmp_path)
    assert done.stdout == "5\n", done.stderr
