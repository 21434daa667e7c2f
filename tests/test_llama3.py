"""llama3.py against the official code in every layout, and against itself."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.load_memory import write_meta
from helpers import (assert_close, assert_gradient, continuation, cross_entropy, digest,
                     published, run)
from safetensors.torch import load_file, save_file

from llama3 import (META, SIZES, Llama3, Llama3Config, RMSNorm, State, from_hugging_face, inverse_frequency,
                    rotate)
from train import load_checkpoint

HF = ("llama3_hf", "llama31_hf", "llama32_hf")
LAYOUTS = ("llama3_meta", "llama3_meta_mp2", "llama3_hf", "llama3_hf/sharded", "llama31_hf",
           "llama31_meta", "llama32_hf")


@pytest.fixture(scope="module")
def golden(golden, tmp_path_factory):
    """The goldens, with the published shards of the same weights put together again."""
    from safetensors.torch import load_file, save_file
    folder = tmp_path_factory.mktemp("golden")
    shutil.copytree(golden, folder, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("rwkv*", "gpt2", "*glm*", "tokenizer*"))
    one, sharded = folder / "llama3_hf", folder / "llama3_hf/sharded"
    places = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(one / "model.safetensors")
    for file in set(places.values()):
        save_file({n: tensors[n] for n in places if places[n] == file}, sharded / file)
    meta = folder / "llama3_meta_mp2"
    params = (meta / "params.json").read_text()
    write_meta(Llama3.from_pretrained(one), meta, 2)
    (meta / "params.json").write_text(params)
    return folder


def load(golden, layout, **overrides):
    return Llama3.from_pretrained(golden / layout, dtype=torch.float32, **overrides)


def answers(golden, layout):
    return published(golden / layout.removesuffix("/sharded").removesuffix("_mp2"))


@pytest.fixture(scope="module")
def expected(golden):
    return published(golden / "llama3_hf")


@pytest.fixture(scope="module")
def model(golden):
    return load(golden, "llama3_hf")


def small(**changes):
    torch.manual_seed(0)
    model = Llama3(replace(Llama3Config.sized(2, 32, 61, 40), **changes)).eval()
    with torch.no_grad():                    # larger weights: peaked, varied distributions
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 8.0)
    return model


# --- goldens ---

@pytest.mark.parametrize("layout", LAYOUTS)
def test_llama3_logits_equal_the_official_ones(golden, layout):
    expected = answers(golden, layout)
    assert_close(load(golden, layout)(expected["tokens"]), expected["logits"], 1e-5, layout)


def test_llama31_logits_and_ids_at_position_1500_equal_the_official_ones(golden):
    model, expected = load(golden, "llama31_meta"), published(golden / "llama31_meta")
    with torch.no_grad():
        logits = model(expected["long_tokens"])
    assert_close(logits[:, ::100], expected["long_logits_at"], 1e-5, "every 100th")
    assert_close(logits[:, -8:], expected["long_logits_last8"], 1e-5, "the last 8")
    ids = model.generate(expected["long_tokens"].tolist(), 16, temperature=0)
    assert ids == expected["long_greedy_ids"].tolist()


@pytest.mark.parametrize("layout", ["llama3_meta", "llama3_hf", "llama32_hf"])
def test_llama3_loss_and_gradients_equal_the_official_ones(golden, layout):
    expected, model = answers(golden, layout), load(golden, layout)
    loss = cross_entropy(model, expected["tokens"])
    loss.backward()
    assert_close(loss, expected["loss"], 1e-6, "loss")
    theirs = published(golden / "llama3_hf") if layout == "llama3_meta" else expected
    names = [name.removeprefix("gradnorm.") for name in theirs if name.startswith("gradnorm.")]
    assert len(names) >= 10
    for name in names:                       # q and k too: Meta's weights are turned to the same
        assert_gradient(model.get_parameter(name).grad, theirs, name, 1e-5)


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "llama31_meta"])
def test_llama3_greedy_ids_equal_the_official_ones(golden, layout):
    expected, model = answers(golden, layout), load(golden, layout)
    ids = model.generate(expected["greedy_prompt"].tolist(), 16, temperature=0)
    assert ids == expected["greedy_ids"].tolist()


@pytest.mark.parametrize("layout", HF)
def test_llama3_rows_of_different_lengths_equal_the_padded_batch_of_transformers(golden, layout):
    expected, model = answers(golden, layout), load(golden, layout)
    mask = expected["leftpad_attention_mask"].bool()
    prompts = [ids[keep].tolist() for ids, keep in zip(expected["leftpad_input_ids"], mask)]
    assert len({len(prompt) for prompt in prompts}) > 1
    assert model.generate(prompts, 16, temperature=0) == expected["leftpad_greedy_ids"].tolist()
    for prompt, logits in zip(prompts, expected["leftpad_last_logits"]):
        assert_close(model(torch.tensor([prompt]))[0, -1], logits, 1e-5, "row")


def test_llama3_generation_equals_meta_for_ragged_prompts_stops_and_an_exact_fit(golden):
    case = json.loads((golden / "llama3_meta/about.json").read_text())["generate_cases"]
    model = load(golden, "llama3_meta")
    ragged = model.generate(case["ragged_prompts"], case["ragged_max_gen_len"], temperature=0)
    assert ragged == case["ragged_expected"] == case["single_row_expected"]
    stopped = model.generate(case["stop_prompts"], case["stop_max_gen_len"], temperature=0,
                             stop=case["stop_ids"])
    assert stopped == case["stop_expected"] and len(stopped[0]) < len(stopped[1])
    tight = load(golden, "llama3_meta", max_position_embeddings=case["fit_max_seq_len"])
    fit = tight.generate([case["fit_prompt"]], case["fit_max_gen_len"], temperature=0)
    assert fit == case["fit_expected"]


@pytest.mark.parametrize("layout", ["llama3_meta", *HF])
def test_bf16_logits_are_no_further_from_fp32_than_the_official_ones(golden, layout):
    expected, model = answers(golden, layout), Llama3.from_pretrained(golden / layout)
    assert model.model.norm.weight.dtype == torch.bfloat16
    ours = (model(expected["tokens"]).float() - expected["logits"]).abs().mean()
    assert 0 < ours <= 1.1 * expected["bf16_error"]


def test_rope_frequencies_of_every_size_equal_the_published_ones_bit_for_bit(golden):
    rows = json.loads((golden / "rope_freqs.json").read_text())["rows"]
    rows = {row["name"]: row for row in rows}
    for name, config in SIZES.items():
        version, size = name.removeprefix("llama").split("-")
        row = rows[{"3": "Llama-3-8B/70B", "3.1": "Llama-3.1-8B/70B/405B (and 3.3)"}.get(
            version, f"Llama-3.2-{size.upper()}")]
        turn = inverse_frequency(config)
        assert turn.dtype == torch.float32 and turn.tolist() == row["inv_freq_hf"], name
        if version != "3.2":                 # Meta's code has the factor 8 for 3.2 too
            assert turn.tolist() == row["inv_freq_meta_official"]
        else:
            eight = inverse_frequency(replace(config, rope_factor=8.0))
            assert eight.tolist() == row["inv_freq_meta_official"]
        for position, cos in row["cos_hf"].items():
            ours = (int(position) * turn).cos()
            assert_close(ours, torch.tensor(cos), 1e-6, f"{name}, {position}")
    for layout in HF:
        ours = inverse_frequency(Llama3.from_pretrained(golden / layout).config)
        assert torch.equal(ours, published(golden / layout)["inv_freq"]), layout


@pytest.mark.parametrize("mistake", [
    dict(rope_theta=10000.0), dict(rms_norm_eps=1e-3), dict(rope_factor=1.0),
    dict(rope_factor=32.0), dict(rope_low_freq_factor=2.0),
    dict(rope_original_max_position_embeddings=8192)])
def test_a_wrong_setting_is_visible_in_the_golden(golden, mistake):
    expected, model = answers(golden, "llama31_hf"), load(golden, "llama31_hf", **mistake)
    assert (model(expected["tokens"]) - expected["logits"]).abs().max() > 0.05


@pytest.mark.parametrize("mistake", ["k not turned", "q not turned", "gate and up", "heads tiled"])
def test_a_wrong_weight_order_is_visible_in_the_golden(golden, mistake):
    expected, model = answers(golden, "llama3_meta"), load(golden, "llama3_meta")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    with torch.no_grad():
        if mistake == "gate and up":
            mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
        elif mistake == "heads tiled":
            heads = attention.q_proj.weight.view(2, 2, 16, 64)
            attention.q_proj.weight.copy_(heads.transpose(0, 1).flatten(0, 2))
        else:
            weight = (attention.k_proj if mistake[0] == "k" else attention.q_proj).weight
            weight.copy_(weight.view(-1, 2, 8, 64).transpose(1, 2).flatten(0, 2))
    assert (model(expected["tokens"]) - expected["logits"]).abs().max() > 0.1


# --- real weights ---

@pytest.mark.parametrize("layout", ["hf", "meta", "meta of Llama 2"])
def test_stories260k_tells_its_known_story(assets, tmp_path, layout):
    folder = assets / "real/stories260K"
    known, expected = json.loads((folder / "expected.json").read_text()), published(folder)
    if layout == "meta of Llama 2":          # no vocabulary size and no RoPE base in its params
        shutil.copytree(folder / "meta", tmp_path / "meta")
        (tmp_path / "meta").chmod(0o755)
        path = tmp_path / "meta/params.json"
        params = json.loads(path.read_text())
        del params["rope_theta"]
        path.chmod(0o644)
        path.write_text(json.dumps({**params, "vocab_size": -1}))
    model = Llama3.from_pretrained(tmp_path / "meta" if "of" in layout else folder / layout)
    assert model.config.vocab_size == 512 and model.config.rope_theta == 10000
    assert model.config.tie_word_embeddings
    ids = known["greedy_ids_from_bos"]
    assert model.generate([ids[:1]], 200, temperature=0) == [ids[1:]]
    logits = model(expected["tokens"])
    assert_close(logits[:, ::20], expected["logits_at_every_20"], 1e-5, "every 20th")
    assert_close(logits[:, -8:], expected["logits_last8"], 1e-5, "last 8")
    loss = cross_entropy(model, expected["tokens"])
    assert loss.item() == pytest.approx(known["observed"]["loss_on_own_text"], rel=1e-5)


# --- sizes and initialisation ---

@pytest.mark.parametrize("name, count", [
    ("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496), ("llama3.1-8b", 8_030_261_248),
    ("llama3.1-70b", 70_553_706_496), ("llama3.1-405b", 405_853_388_800),
    ("llama3.2-1b", 1_235_814_400), ("llama3.2-3b", 3_212_749_824)])
def test_published_sizes_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        model = Llama3(SIZES[name])
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.config.context == (8192 if name.startswith("llama3-") else 131072)


def test_the_sizes_state_what_the_published_configs_state():
    told = {name: (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
                   c.intermediate_size, c.rope_factor, c.tie_word_embeddings) for name, c in SIZES.items()}
    assert told == {
        "llama3-8b": (4096, 32, 32, 8, 128, 14336, 1, False), "llama3-70b": (8192, 80, 64, 8, 128, 28672, 1, False),
        "llama3.1-8b": (4096, 32, 32, 8, 128, 14336, 8, False),
        "llama3.1-70b": (8192, 80, 64, 8, 128, 28672, 8, False),
        "llama3.1-405b": (16384, 126, 128, 8, 128, 53248, 8, False),
        "llama3.2-1b": (2048, 16, 32, 8, 64, 8192, 32, True), "llama3.2-3b": (3072, 28, 24, 8, 128, 8192, 32, True)}
    for c in SIZES.values():
        assert (c.vocab_size, c.rms_norm_eps, c.rope_theta) == (128256, 1e-5, 500000.0)
        assert (c.rope_low_freq_factor, c.rope_high_freq_factor) == (1.0, 4.0)
        assert c.rope_original_max_position_embeddings == 8192
        assert (c.bos_token_id, c.eos_token_id, c.pad_token_id) == (128000, 128001, None)
    assert replace(Llama3Config(), bos_token_id=128000, eos_token_id=128001) == SIZES["llama3-8b"]


def test_fields_that_a_config_leaves_out_have_the_defaults_of_transformers():
    least = dict(model_type="llama", hidden_size=96, num_attention_heads=6, num_hidden_layers=3, intermediate_size=11,
                 vocab_size=50)
    plain = Llama3Config(2048, 96, 3, 6, 6, 16, 11, 50, rms_norm_eps=1e-6, rope_theta=10000.0)
    scaled = dict(factor=4.0, low_freq_factor=2.0, high_freq_factor=3.0, original_max_position_embeddings=77)
    as_ours = {f"rope_{name}": value for name, value in scaled.items()}
    for stated, changes in (
            ({}, {}), (dict(head_dim=None, rope_scaling=None), {}), (dict(head_dim=8), dict(head_dim=8)),
            (dict(num_key_value_heads=2, rms_norm_eps=1e-5), dict(num_key_value_heads=2, rms_norm_eps=1e-5)),
            (dict(rope_theta=7.0, max_position_embeddings=9), dict(rope_theta=7.0, max_position_embeddings=9)),
            (dict(rope_parameters=dict(rope_theta=7.0, rope_type="default")), dict(rope_theta=7.0)),
            (dict(rope_scaling=dict(rope_type="llama3", **scaled)), as_ours),
            (dict(rope_scaling=dict(type="llama3", **scaled)), as_ours),
            (dict(tie_word_embeddings=True, eos_token_id=[3, 4]), dict(tie_word_embeddings=True, eos_token_id=[3, 4])),
            (dict(hidden_act="silu", attention_bias=False, partial_rotary_factor=1.0), {})):
        assert from_hugging_face({**least, **stated}) == replace(plain, **changes), stated


@pytest.mark.parametrize("stated, changes", [
    ({}, {}), (dict(norm_eps=1e-6), dict(rms_norm_eps=1e-6)), (dict(rope_theta=7.0), dict(rope_theta=7.0)),
    (dict(vocab_size=-1), dict(rope_theta=10000.0)), (dict(multiple_of=256, ffn_dim_multiplier=1.3), {}),
    (dict(n_kv_heads=None), dict(num_key_value_heads=4))])
def test_fields_that_params_json_leaves_out_have_the_defaults_of_metas_code(stated, changes, tmp_path):
    config = Llama3Config(8192, 16, 1, 4, 2, 4, 10, 32, 1e-5, 500000.0)
    if "n_kv_heads" in stated:
        config = replace(config, num_key_value_heads=4)
    write_meta(Llama3(config), tmp_path)
    params = {**dict(dim=16, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=32), **stated}
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert Llama3.from_pretrained(tmp_path).config == replace(config, **changes)


@pytest.mark.parametrize("width, heads, shared, size, wide", [
    (2, 1, 1, 2, 32), (32, 1, 1, 32, 128), (64, 1, 1, 64, 224), (128, 2, 1, 64, 448), (256, 4, 1, 64, 896),
    (320, 5, 5, 64, 1120), (384, 6, 2, 64, 1344), (512, 8, 2, 64, 1792), (3008, 47, 47, 64, 10528),
    (3072, 24, 6, 128, 10752), (4096, 32, 8, 128, 14336)])
def test_sized_has_the_proportions_of_8b(width, heads, shared, size, wide):
    assert Llama3Config.sized(3, width, 99, 50) == Llama3Config(
        50, width, 3, heads, shared, size, wide, 99, tie_word_embeddings=width < 4096)


def test_every_size_is_listed_and_sized_has_their_proportions():
    assert set(SIZES) == {"llama3-8b", "llama3-70b", "llama3.1-8b", "llama3.1-70b", "llama3.1-405b",
                          "llama3.2-1b", "llama3.2-3b"}
    ids = dict(bos_token_id=128000, eos_token_id=128001)
    assert replace(Llama3Config.sized(32, 4096, 128256, 8192), **ids) == SIZES["llama3-8b"]
    for name in ("llama3-70b", "llama3.1-405b", "llama3.2-1b", "llama3.2-3b"):
        like = SIZES[name]
        config = Llama3Config.sized(like.num_hidden_layers, like.hidden_size, 128256, like.context)
        for field in ("head_dim", "num_attention_heads", "tie_word_embeddings", "context"):
            assert getattr(config, field) == getattr(like, field), (name, field)


@pytest.mark.parametrize("width", [2, 17, 32, 33, 96, 128, 250, 384, 520, 1000])
def test_sized_gives_a_model_that_runs_at_any_width(width):
    config = Llama3Config.sized(1, width, 50, 16)
    assert (config.hidden_size, config.vocab_size, config.context) == (width, 50, 16)
    assert Llama3(config)(torch.tensor([[1, 2, 3]])).shape == (1, 3, 50)


def test_initial_values_are_as_documented():
    torch.manual_seed(0)
    model = Llama3(replace(Llama3Config.sized(8, 128, 512, 256), tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:                                # 0.02 / sqrt(2 * 8) = 0.005
            want = 0.005 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(want, rel=0.05), name


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = small(tie_word_embeddings=False)
    groups = model.parameter_groups(0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("num_hidden_layers", -1), ("num_key_value_heads", 3), ("hidden_size", 0),
    ("head_dim", 7), ("rope_theta", 0.0), ("rms_norm_eps", float("nan")), ("rope_factor", 0.0),
    ("rope_high_freq_factor", 1.0), ("intermediate_size", 0), ("rope_theta", float("inf")),
    ("max_position_embeddings", 0), ("num_attention_heads", 0)])
def test_an_impossible_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        replace(Llama3Config.sized(2, 512, 61, 40), **{field: value})


def test_the_model_holds_nothing_but_its_parameters(model):
    assert not list(model.buffers())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


# --- the state ---

def test_a_cached_pass_in_pieces_equals_one_pass(model, expected):
    tokens = expected["tokens"]
    state = model.new_state(len(tokens), 30)
    assert state.key.shape == (2, 2, 2, 30, 16)                         # K heads, not H
    with torch.no_grad():
        pieces = [model(piece, state) for piece in tokens.split([5, 1, 11, 7], dim=1)]
    # Other lengths, other orders of fp32 sums: Meta's own code differs by 1.4e-5 here, at scale 10.
    assert_close(torch.cat(pieces, 1), model(tokens), 1e-5, "logits")
    assert state.position.tolist() == [24, 24]
    assert_close(model(tokens[:, :1]), model(tokens)[:, :1], 1e-5, "one id, no state")


def test_gradients_with_a_state_are_those_of_the_piece_alone():
    model, tokens = small(), torch.arange(20).view(2, 10)
    state = model.new_state(2, 10)
    model.hidden(tokens[:, :6], state)
    assert not state.key.requires_grad
    before = State(*map(torch.clone, state))
    model(tokens[:, 6:], state).square().sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
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
    assert_close(before.key, state.key, 1e-6, "cache")


def test_rows_go_on_from_different_positions_of_one_state(model):
    rows = [[5, 9, 2, 7, 1], [3, 8]]
    state = model.new_state(2, 12)
    with torch.no_grad():
        for i, row in enumerate(rows):
            model.hidden(torch.tensor([row]), state._make(t[i:i + 1] for t in state))
        together = model(torch.tensor([[4, 6], [4, 6]]), state)
        for i, row in enumerate(rows):
            assert_close(together[i], model(torch.tensor([row + [4, 6]]))[0, -2:], 1e-5, f"row {i}")
    assert state.position.tolist() == [7, 4]


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


def test_too_many_tokens_are_an_error_with_both_numbers():
    model = small()
    with pytest.raises(ValueError, match=r"41.*40"):
        model(torch.zeros(1, 41, dtype=torch.int64))
    state = model.new_state(1, 5)
    with pytest.raises(ValueError, match=r"6.*5"):
        model(torch.zeros(1, 6, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="rows"):
        model(torch.zeros(2, 3, dtype=torch.int64), state)


def test_greedy_generation_equals_recomputing_everything():
    model = small()
    prompts = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3, 5], [8, 9]]
    want = [continuation(model, prompt, 12) for prompt in prompts]
    assert model.generate(prompts, 12, temperature=0) == want
    assert len({tuple(row) for row in want}) > 2


def test_going_on_from_a_state_equals_one_long_prompt():
    model, ids = small(), []
    state = model.new_state(1, 40)
    for turn in ([3, 1, 4], [1, 5, 9, 2], [6]):
        ids += turn
        [new] = model.generate([ids[int(state.position):]], 6, state=state, temperature=0)
        assert new == continuation(model, ids, 6)
        ids += new


# --- precisions and compilation ---

def test_the_norm_in_bf16_is_metas_formula_bit_for_bit():
    """Normed in fp32, rounded, and then multiplied by the weight: torch's own rounds once, at the end."""
    torch.manual_seed(0)
    for eps, scale in ((1e-5, 1.0), (1e-5, 1e-3), (0.1, 0.3)):
        norm, x = RMSNorm(64, eps).bfloat16(), (torch.randn(3, 7, 64) * scale).bfloat16()
        norm.weight.data.normal_()
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        assert torch.equal(norm(x), normed.type_as(x) * norm.weight)
        assert not torch.equal(norm(x), (normed * norm.weight.float()).bfloat16())
        assert norm(x).dtype == torch.bfloat16
    model = small(rms_norm_eps=0.25)
    assert [module.eps for module in model.modules() if isinstance(module, RMSNorm)] == [0.25] * 5


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
    assert cos.shape == (2, 1, 3, model.config.head_dim // 2) and cos.dtype == torch.float32
    x = torch.randn(2, 5, 3, 32).bfloat16()
    a, b = x.double().chunk(2, -1)
    exact = torch.cat((a * cos.double() - b * sin.double(), a * sin.double() + b * cos.double()), -1)
    assert rotate(x, cos, sin).dtype == torch.bfloat16                  # rounded once
    assert (rotate(x, cos, sin).double() - exact).abs().max() <= exact.abs().max() / 256
    assert_close(rotate(x.float(), cos, sin), exact.float(), 1e-6, "fp32")

def test_autocast_runs_training_and_a_state_close_to_fp32(model, expected):
    tokens = expected["tokens"]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        state = model.new_state(2, 24)
        pieces = [model(piece, state) for piece in tokens.split([20, 4], dim=1)]
    assert logits.dtype == torch.bfloat16 and state.key.dtype == torch.float32
    full = expected["logits"]
    for got in (logits, torch.cat(pieces, 1)):
        assert (got.float() - full).abs().mean() < 0.06                 # bf16 of Meta: 0.035
    logits.float().square().mean().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.dtype == torch.float32
    model.zero_grad()


def test_a_bf16_model_keeps_a_bf16_state_and_exact_positions(golden):
    model = Llama3.from_pretrained(golden / "llama31_meta")
    exact = load(golden, "llama31_meta")
    tokens = published(golden / "llama31_meta")["long_tokens"][:, :1000]
    with torch.no_grad():
        state = model.new_state(1, 1000)
        assert state.key.dtype == torch.bfloat16
        got = torch.cat([model(piece, state) for piece in tokens.split(400, dim=1)], 1).float()
        far = (got - exact(tokens)).abs().mean(-1)[0]                   # (T,)
    assert far[-200:].mean() < 2 * far[:200].mean()                     # no loss with the position


def test_hidden_compiles_to_one_graph_equal_to_eager(model, expected):
    compiled = torch.compile(model.hidden, fullgraph=True, backend="eager")
    tokens, one, two = expected["tokens"], model.new_state(2, 30), model.new_state(2, 30)
    with torch.no_grad():
        assert torch.equal(compiled(tokens), model.hidden(tokens))
        for piece in (tokens[:, :9], tokens[:, 9:10]):                  # compiled: all slots
            assert_close(compiled(piece, one), model.hidden(piece, two), 1e-5, "hidden")
    assert one.position.tolist() == [10, 10]


# --- Meta's shards ---

GROUPED = dict(hidden_size=64, num_attention_heads=16, num_key_value_heads=8, head_dim=4,
               intermediate_size=96, vocab_size=64)


def test_writing_the_hugging_face_golden_as_meta_gives_the_meta_golden(golden, tmp_path):
    """The writer that the next tests use is itself right: each tensor as Meta's own code has it."""
    write_meta(Llama3.from_pretrained(golden / "llama3_hf"), tmp_path)
    ours = torch.load(tmp_path / "consolidated.00.pth")
    theirs = torch.load(golden / "llama3_meta/consolidated.00.pth")
    assert set(ours) == set(theirs) and len(ours) == 2 * 9 + 3
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_the_shards_put_together_for_these_tests_are_the_published_ones(golden):
    """By digest: the official shards themselves would be the same weights three times."""
    from safetensors.torch import load_file
    folders = {"llama3_hf/sharded": load_file, "llama3_meta_mp2": torch.load}
    for folder, read in folders.items():
        want = json.loads((golden / folder / "digests.json").read_text())
        assert len(want) == 2
        for file, told in want.items():
            assert digest(read(golden / folder / file)) == told, file


@pytest.mark.parametrize("shards, copies, by_width, tied", [
    (1, 1, False, False), (2, 1, False, True), (8, 1, False, False), (16, 2, False, False),
    (16, 2, False, True), (4, 1, True, False)])
def test_shards_are_joined_to_the_same_model(tmp_path, shards, copies, by_width, tied):
    model, tokens = small(tie_word_embeddings=tied, **GROUPED), torch.arange(30).view(2, 15)
    write_meta(model, tmp_path, shards, copies, by_width)
    assert len(list(tmp_path.glob("*.pth"))) == shards
    again = Llama3.from_pretrained(tmp_path)
    assert again.config.num_key_value_heads == 8 * copies               # repeated: as the file says
    assert again.config.tie_word_embeddings == tied
    assert_close(again(tokens), model(tokens), 1e-6 if copies > 1 else 0, "logits")
    half = Llama3.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_golden_shards_give_the_bits_of_the_single_file(golden):
    one, two = (Llama3.from_pretrained(golden / x) for x in ("llama3_meta", "llama3_meta_mp2"))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name
    three = Llama3.from_pretrained(golden / "llama3_meta/consolidated.00.pth")
    assert all(torch.equal(p, three.get_parameter(n)) for n, p in one.named_parameters())


@pytest.mark.parametrize("width, scaled, factor, context", [
    (64, False, 1.0, 8192), (64, True, 8.0, 131072), (2048, True, 32.0, 131072),
    (3072, True, 32.0, 131072)])
def test_meta_params_decide_rope_factor_and_context(tmp_path, width, scaled, factor, context):
    config = replace(Llama3Config.sized(1, 64, 32, 40), hidden_size=width, intermediate_size=2,
                     num_attention_heads=width // 64, num_key_value_heads=1, head_dim=64,
                     rope_factor=8.0 if scaled else 1.0)
    write_meta(Llama3(config), tmp_path)
    config = Llama3.from_pretrained(tmp_path).config
    assert (config.rope_factor, config.context) == (factor, context)
    config = Llama3.from_pretrained(tmp_path, rope_factor=4.0, max_position_embeddings=99).config
    assert (config.rope_factor, config.context) == (4.0, 99)


def test_a_meta_folder_with_the_published_vocabulary_knows_its_ids(tmp_path):
    write_meta(Llama3(Llama3Config.sized(1, 2, 128256, 40)), tmp_path)
    config = Llama3.from_pretrained(tmp_path).config
    assert (config.bos_token_id, config.eos_token_id) == (128000, 128001)


def test_original_is_read_where_the_repository_holds_no_other_weights(golden, tmp_path):
    shutil.copytree(golden / "llama3_meta_mp2", tmp_path / "original/mp8")
    shutil.copy(golden / "llama3_hf/config.json", tmp_path)
    tokens = torch.arange(20)[None]
    want = Llama3.from_pretrained(golden / "llama3_meta")(tokens)
    assert torch.equal(Llama3.from_pretrained(tmp_path)(tokens), want)
    shutil.copy(golden / "llama32_hf/model.safetensors", tmp_path)
    shutil.copy(golden / "llama32_hf/config.json", tmp_path)            # other weights: these count
    assert Llama3.from_pretrained(tmp_path).config.rope_factor == 32


def test_a_single_file_is_mapped_not_copied(golden):
    """The memory of a parameter lies in the file's mapping: nothing was copied to load it."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    for file in ("llama3_hf/model.safetensors", "llama3_meta/consolidated.00.pth"):
        layout = file.split("/")[0]
        model = Llama3.from_pretrained(golden / layout)
        lines = [line.split() for line in maps.read_text().splitlines() if line.endswith(file)]
        ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
        for name, parameter in model.named_parameters():
            if layout == "llama3_hf" or "q_proj" not in name and "k_proj" not in name:
                assert any(a <= parameter.data_ptr() < b for a, b in ranges), name


# --- Hugging Face's files ---

@pytest.mark.parametrize("layout", HF)
def test_old_and_new_config_fields_give_the_same_config(golden, tmp_path, layout):
    stated = json.loads((golden / layout / "config.json").read_text())
    older = json.loads(json.dumps(stated).replace("rope_type", "type"))
    newer = json.loads((golden / layout / "config_v5.json").read_text())
    configs = []
    for config in (stated, older, newer):
        shutil.copy(golden / layout / "model.safetensors", tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config))
        configs.append(Llama3.from_pretrained(tmp_path).config)
    assert configs[0] == configs[1] == configs[2]
    assert (configs[0].rope_factor == 1) == (layout == "llama3_hf")


def changed(golden, folder, layout="llama3_hf", tensors=None, **fields):
    """A copy of a golden with other config fields; tensors added, replaced, or removed (None)."""
    from safetensors.torch import load_file, save_file
    folder.mkdir(exist_ok=True)
    config = {**json.loads((golden / layout / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps(config))
    all_tensors = {**load_file(golden / layout / "model.safetensors"), **(tensors or {})}
    save_file({n: t for n, t in all_tensors.items() if t is not None}, folder / "model.safetensors")
    return folder


def test_an_explicit_head_wins_where_the_config_says_tied(golden, tmp_path):
    from safetensors.torch import load_file
    table = load_file(golden / "llama32_hf/model.safetensors")["model.embed_tokens.weight"]
    same = changed(golden, tmp_path / "same", "llama32_hf", {"lm_head.weight": table.clone()})
    other = changed(golden, tmp_path / "other", "llama32_hf", {"lm_head.weight": -table})
    tokens = torch.arange(20)[None]
    want = Llama3.from_pretrained(golden / "llama32_hf")(tokens)
    assert Llama3.from_pretrained(same).config.tie_word_embeddings
    assert torch.equal(Llama3.from_pretrained(same)(tokens), want)
    model = Llama3.from_pretrained(other)
    assert not model.config.tie_word_embeddings and torch.equal(model(tokens), -want)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(Llama3.from_pretrained(tmp_path / "again")(tokens), -want)
    apart = Llama3.from_pretrained(same, tie_word_embeddings=False)     # asked for: kept as its own
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight


def test_stored_rope_tables_are_ignored(golden, tmp_path):
    tokens = torch.arange(20)[None]
    old = changed(golden, tmp_path / "hf", tensors={
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((8,), 7.0) for i in (0, 1)})
    want = Llama3.from_pretrained(golden / "llama3_hf")(tokens)
    assert torch.equal(Llama3.from_pretrained(old)(tokens), want)
    for layout in ("llama3_meta", "llama3_meta_mp2"):
        shutil.copytree(golden / layout, tmp_path / layout)
        for file in (tmp_path / layout).glob("*.pth"):
            torch.save({**torch.load(file), "rope.freqs": torch.full((8,), 7.0)}, file)
        assert torch.equal(Llama3.from_pretrained(tmp_path / layout)(tokens), want)


@pytest.mark.parametrize("fields, words", [
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"model_type": "mistral"}, "mistral"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_scaling": [1]}, "not a mapping"), ({"hidden_size": None}, "hidden_size"),
    ({"num_attention_heads": "4"}, "num_attention_heads"), ({"rope_theta": "big"}, "rope_theta"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"num_hidden_layers": 3}, "layers.2"),
    ({"intermediate_size": 200}, "size mismatch"), ({"vocab_size": 321}, "size mismatch")])
def test_a_config_of_other_mathematics_or_sizes_is_refused_by_name(golden, tmp_path, fields, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_checkpoint(changed(golden, tmp_path, **fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tensors, words", [
    ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "q_proj.bias"),
    ({"lm_head.weight": None}, "lm_head"), ({"model.norm.weight": None}, "model.norm"),
    ({"model.norm.weight": torch.ones(63)}, "model.norm")])
def test_unknown_missing_and_misshapen_tensors_are_named(golden, tmp_path, tensors, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_checkpoint(changed(golden, tmp_path, tensors=tensors))
    assert "\n" not in str(caught.value)


def damage_meta(folder, kind):
    """One fault in a copy of the golden in two shards."""
    second, path = folder / "consolidated.01.pth", folder / "params.json"
    tensors, params = torch.load(second), json.loads(path.read_text())
    if kind == "no second shard":
        second.unlink()
    elif kind == "a gap":
        second.rename(folder / "consolidated.02.pth")
    elif kind == "no shards":
        second.unlink()
        (folder / "consolidated.00.pth").unlink()
    elif kind == "truncated":
        second.write_bytes(second.read_bytes()[:7000])
    elif kind == "pointer":
        second.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif kind == "no params":
        path.unlink()
    elif kind == "only in the second":
        torch.save({**tensors, "layers.7.attention.wo.weight": torch.ones(64, 32)}, second)
    elif kind in ("lacks a tensor", "unknown tensor", "shape", "not a matrix", "no tensor"):
        name = "layers.1.attention.wk.weight"
        old = tensors.pop(name)
        tensors |= {"lacks a tensor": {}, "unknown tensor": {name: old, "vision.weight": old},
                    "shape": {name: old[:-16]}, "not a matrix": {name: old[0]},
                    "no tensor": {name: "text"}}[kind]
        torch.save(tensors, second)
    else:
        params |= {"heads": {"n_heads": 8}, "other width": {"dim": 128}, "text": {"dim": "64"},
                   "quantised": {"quantization_args": {}}, "vocabulary": {"vocab_size": 300},
                   "layers": {"n_layers": 3}, "no heads": {"n_heads": 0}}[kind]
        path.write_text(json.dumps(params))


@pytest.mark.parametrize("kind, words", [
    ("no second shard", "160 rows of a vocabulary of 320.*missing"),
    ("a gap", "160 rows of a vocabulary of 320.*missing"),
    ("no shards", "consolidated.00.pth: No such file"),
    ("truncated", "01.pth|Errno 22"), ("pointer", "git lfs"), ("no params", "params.json"),
    ("lacks a tensor", "wk"), ("unknown tensor", "vision.weight"), ("shape", "wk"),
    ("not a matrix", "wk"), ("only in the second", "layers.7"), ("no tensor", "unflatten"),
    ("heads", "k_proj"), ("other width", "sizes"),
    ("text", "does not fit.*'str'"), ("quantised", "quantization_args"),
    ("vocabulary", "320 rows of a vocabulary of 300"), ("layers", "layers.2"),
    ("no heads", "does not fit.*zero")])
def test_a_damaged_meta_folder_is_one_clear_line(golden, tmp_path, kind, words):
    shutil.copytree(golden / "llama3_meta_mp2", tmp_path / "copy")
    damage_meta(tmp_path / "copy", kind)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        load_checkpoint(tmp_path / "copy")
    assert "\n" not in str(caught.value) and 20 < len(str(caught.value)) < 600


def test_a_pickle_that_would_run_code_is_refused(golden, tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))
    shutil.copy(golden / "llama3_meta/params.json", tmp_path)
    torch.save({"norm.weight": Evil()}, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match="damaged, or no file of tensors"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_overrides_are_checked(golden):
    with pytest.raises(ValueError, match="n_heads"):
        load_checkpoint(golden / "llama3_hf", n_heads=3)
    with pytest.raises(ValueError, match="rope_theta"):
        load_checkpoint(golden / "llama3_hf", rope_theta=-1.0)
    for field, value in (("hidden_size", "8"), ("rope_factor", "8"), ("tie_word_embeddings", 1),
                         ("intermediate_size", True)):
        with pytest.raises(ValueError, match=field):
            load_checkpoint(golden / "llama3_hf", **{field: value})


def test_every_name_of_meta_is_a_parameter_of_the_model():
    names = {name.replace("model.layers.0.", "").removesuffix(".weight")
             for name in Llama3(Llama3Config.sized(1, 4096 // 64, 61, 40)).state_dict()}
    assert names | {"lm_head"} == {ours for ours, _ in META.values()}


# --- writing ---

@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_what_is_written_states_the_model_in_the_words_of_transformers(tmp_path, factor):
    from safetensors import safe_open
    config = Llama3Config(9, 8, 1, 2, 1, 4, 5, 7, 1e-4, 77.0, factor, 2.0, 3.0, 6, tie_word_embeddings=factor == 1,
                          bos_token_id=1, eos_token_id=[2, 3])
    Llama3(config).bfloat16().save_pretrained(tmp_path)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0,
               "original_max_position_embeddings": 6}
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "dtype": "bfloat16", "max_position_embeddings": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 5, "vocab_size": 7, "rms_norm_eps": 1e-4,
        "rope_theta": 77.0, "rope_scaling": scaling if factor == 8 else None, "tie_word_embeddings": factor == 1,
        "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as content:
        assert content.metadata() == {"format": "pt"}
        assert ("lm_head.weight" in content.keys()) == (factor == 8)
        assert len([*content.keys()]) == 2 + 9 + (factor == 8)

def test_save_then_load_gives_the_same_bits_and_config(golden, tmp_path):
    tokens = torch.arange(20)[None]
    for source in LAYOUTS:
        model = Llama3.from_pretrained(golden / source)
        for _ in range(2):                   # the second over the file that is still mapped
            model.save_pretrained(tmp_path / "copy")
            again = Llama3.from_pretrained(tmp_path / "copy")
            assert again.config == model.config
            assert torch.equal(model(tokens), again(tokens)), source
            model = again
        assert [p.name for p in (tmp_path / "copy").glob("*.part")] == []


def test_saved_models_open_in_transformers_to_the_same_logits(golden, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    own = Llama3(replace(Llama3Config.sized(2, 33, 64, 40), bos_token_id=1, eos_token_id=[2, 3],
                         pad_token_id=0))
    for source in ("llama31_hf", "llama31_meta", "llama32_hf", own):
        model = source if source is own else load(golden, source)
        model.save_pretrained(tmp_path / "copy")
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "copy").eval()
        assert theirs.config.head_dim == model.config.head_dim
        tokens = torch.arange(40)[None]
        assert_close(model(tokens), theirs(tokens).logits, 1e-5, str(source)[:20])
        stated = json.loads((tmp_path / "copy/config.json").read_text())
        assert {"rope_theta", "rope_scaling", "head_dim", "torch_dtype"} <= set(stated)
        theirs.save_pretrained(tmp_path / "theirs")                     # and back, in its new form
        again = Llama3.from_pretrained(tmp_path / "theirs")
        assert again.config == model.config and torch.equal(again(tokens), model(tokens))


# --- the file alone, and its command ---

def test_the_file_alone_builds_trains_saves_loads_and_generates(root, tmp_path):
    shutil.copy(root / "llama3.py", tmp_path)
    (tmp_path / "use.py").write_text("""
import torch, llama3
model = llama3.Llama3(llama3.Llama3Config.sized(1, 16, 20, 12))
tokens = torch.arange(12)[None] % 20
loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
loss.backward()
model.save_pretrained("saved")
print(len(llama3.Llama3.from_pretrained("saved").generate([[1, 2]], 5, seed=0)[0]))
""")
    done = run("use.py", cwd=tmp_path)
    assert done.stdout == "5\n", done.stderr

