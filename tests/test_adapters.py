"""Adapters as peft saves them: read, merged with their base, refused by name; chat.py on their folder."""
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file
from test_chat import assert_fails, make_model, make_tokenizer, scratch, start, write_world
from torch import nn

import chat
import lora
from checkpoints import load_checkpoint
from tokenizer import load_tokenizer

TOKENS = torch.arange(3, 43)[None]
SPREAD = {"gpt": ["c_attn", "mlp.c_proj"], "llama3": ["q_proj", "down_proj"],
          "glm4": ["q_proj", "gate_up_proj"]}


@pytest.fixture(scope="module")
def bases(golden, tmp_path_factory):
    """A tiny checkpoint of each architecture with its tokenizer, in the layout that transformers reads."""
    made = {}
    for kind in SPREAD:
        folder = made[kind] = tmp_path_factory.mktemp(kind)
        tokenizer = make_tokenizer(kind, golden)
        make_model(kind, tokenizer.vocab_size).save_pretrained(folder)
        tokenizer.save(folder)
    return made


def make_adapter(base, out, targets=r"\.\d+\.", rank=3):
    """An adapter as finetune.py writes it, of random matrices."""
    settings = SimpleNamespace(lora=rank, lora_alpha=2.0 * rank, lora_targets=targets, init_from=base)
    model = load_checkpoint(base)
    torch.manual_seed(1)
    lora.add_lora(model, settings)
    for module in lora.adapters(model).values():
        nn.init.normal_(module.lora_B, std=0.1)
    out.mkdir(exist_ok=True)
    lora.save_adapter(model, settings, out)
    return model.eval()


@pytest.fixture
def adapter(bases, tmp_path):
    """The folder of an adapter of llama3, as finetune.py writes it."""
    make_adapter(bases["llama3"], tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def peft_adapter(base, out, **settings):
    """The model with an adapter that peft made and saved; what it saves whole is changed too."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(2)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        **{"r": 4, "lora_alpha": 3, "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings}))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(out)
    return theirs.eval()


@pytest.mark.parametrize("kind", SPREAD)
@pytest.mark.parametrize("settings", [
    {}, {"rank_pattern": {"SECOND": 2}, "alpha_pattern": {"FIRST": 5}},
    {"rank_pattern": {r".*\.1\..*FIRST": 7}, "use_rslora": True}, {"target_modules": "all-linear"},
    {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [1]}], ids=str)
def test_what_peft_saves_is_merged_to_the_same_logits(settings, kind, bases, tmp_path):
    words = dict(zip(("FIRST", "SECOND"), SPREAD[kind]))
    settings = json.loads(json.dumps(settings).replace("FIRST", words["FIRST"]).replace("SECOND", words["SECOND"]))
    theirs = peft_adapter(bases[kind], tmp_path, **{"target_modules": SPREAD[kind], **settings})
    model = lora.load_merged(tmp_path, bases[kind])
    with torch.no_grad():
        ours, expected = model(TOKENS), theirs(TOKENS).logits
        assert_close(ours, expected, 2e-5, "unmerged")
        assert_close(ours, theirs.merge_and_unload()(TOKENS).logits, 2e-5, "merged by peft")
        assert (load_checkpoint(bases[kind])(TOKENS) - ours).abs().max() > 0.01 * ours.abs().max()
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(load_checkpoint(tmp_path / "merged")(TOKENS), ours)


@pytest.mark.parametrize("kind, module", [("gpt", "c_fc"), ("gpt", "wte"), ("llama3", "embed_tokens"),
                                          ("glm4", "norm")])
def test_a_module_that_was_trained_whole_takes_the_place_of_the_bases(kind, module, bases, tmp_path):
    theirs = peft_adapter(bases[kind], tmp_path, target_modules=SPREAD[kind], modules_to_save=[module])
    with torch.no_grad():
        assert_close(lora.load_merged(tmp_path, bases[kind])(TOKENS), theirs(TOKENS).logits, 2e-5)


def test_a_bfloat16_base_is_merged_to_the_bits_of_peft(bases, tmp_path):
    load_checkpoint(bases["llama3"], dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    theirs = peft_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=SPREAD["llama3"])
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in lora.load_merged(tmp_path / "adapter", tmp_path / "base").state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, merged[name]), name


def test_adapter_model_bin_is_read_like_safetensors(adapter, bases):
    expected = lora.load_merged(adapter, bases["llama3"])(TOKENS)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert torch.equal(lora.load_merged(adapter, bases["llama3"])(TOKENS), expected)


def test_names_with_the_adapters_name_in_them_are_read(adapter, bases):
    expected, file = lora.load_merged(adapter, bases["llama3"])(TOKENS), adapter / "adapter_model.safetensors"
    save_file({name.replace(".weight", ".default.weight"): tensor for name, tensor in load_file(file).items()}, file)
    assert torch.equal(lora.load_merged(adapter, bases["llama3"])(TOKENS), expected)


@pytest.mark.parametrize("layout", ["glm4", "chatglm3"])
def test_an_adapter_of_the_remote_code_divides_query_key_value(layout, golden, tmp_path):
    """What peft saves of ChatGLM3 and of GLM-4 with remote code: one pair for the fused matrix."""
    base = tmp_path / "base"
    shutil.copytree(golden / layout, base)
    weights, pairs = load_file(base / "model.safetensors"), {}
    for n in range(2):
        place = f"transformer.encoder.layers.{n}.self_attention.query_key_value"
        rows, columns = weights[f"{place}.weight"].shape
        A, B = torch.randn(5, columns) / 8, torch.randn(rows, 5) / 8
        pairs |= {f"base_model.model.{place}.lora_{half}.weight": part for half, part in (("A", A), ("B", B))}
        weights[f"{place}.weight"] = (weights[f"{place}.weight"].float() + 2.0 * B @ A).to(weights[f"{place}.weight"].dtype)
    (tmp_path / "adapter").mkdir()
    save_file(pairs, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 5, "lora_alpha": 10}))
    model = lora.load_merged(tmp_path / "adapter", base)
    save_file(weights, base / "model.safetensors")
    assert_close(model(TOKENS), load_checkpoint(base)(TOKENS), 2e-5)


def test_a_head_that_was_adapted_is_tied_no_more(bases, tmp_path):
    """It shares its matrix with the token table, which the adapter leaves alone."""
    theirs = peft_adapter(bases["gpt"], tmp_path / "adapter", target_modules=["lm_head"])
    model = lora.load_merged(tmp_path / "adapter", bases["gpt"])
    assert not model.config.tie_word_embeddings and load_checkpoint(bases["gpt"]).config.tie_word_embeddings
    with torch.no_grad():
        assert_close(model(TOKENS), theirs(TOKENS).logits, 2e-5)


# --- what is refused, by name ---


@pytest.mark.parametrize("values, words", [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"), ({"use_dora": True}, "use_dora is True"),
    ({"bias": "all"}, "bias is 'all'"), ({"lora_bias": True}, "lora_bias is True"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is [[0, 2], [1, 2]]"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
    ({"target_parameters": ["x"]}, "target_parameters"), ({"use_qalora": True}, "use_qalora"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"), ({"of_tomorrow": 1}, "of_tomorrow is 1"),
    ({"r": 5}, "is of rank 3, but the adapter's config says 5"), ({"rank_pattern": {"q_proj": 9}}, "says 9"),
    ({"lora_alpha": "x"}, "states what does not fit"), ({"alpha_pattern": {"(": 3}}, "adapter")])
def test_what_is_not_supported_is_refused_by_name(values, words, adapter, bases):
    change_config(adapter, **values)
    with pytest.raises(ValueError) as refused:
        lora.load_merged(adapter, bases["llama3"])
    assert words in str(refused.value) and str(adapter) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("change, words", [
    (lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 9)},
     "lora_embedding_A is of a kind that is not supported"),
    (lambda t: {**t, f"{next(iter(t)).removesuffix('A.weight')}magnitude_vector": torch.zeros(3)}, "magnitude_vector"),
    (lambda t: {k: v for k, v in t.items() if "0.self_attn.q_proj.lora_B" not in k}, "only one of lora_A and lora_B"),
    (lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(999, 32)}, "one whose vocabulary was resized"),
    (lambda t: {**t, "base_model.model.score.weight": torch.zeros(2, 32)}, "score.weight (2, 32) is no adapter"),
    (lambda t: {k: v[:, :7].contiguous() for k, v in t.items()}, "made for another model"),
    (lambda t: {}, "holds no adapter")])
def test_tensors_that_do_not_belong_to_the_base_are_refused(change, words, adapter, bases):
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError) as refused:
        lora.load_merged(adapter, bases["llama3"])
    assert words in str(refused.value)


def test_damaged_and_missing_files_of_an_adapter_are_one_line(adapter, bases, capsys):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    assert_fails(capsys, [adapter], "adapter is damaged")
    file.unlink()
    assert_fails(capsys, [adapter], "adapter_model.bin")
    (adapter / "adapter_config.json").write_text("[")
    assert_fails(capsys, [adapter], "adapter_config.json holds no JSON object")


# --- chat.py on its folder ---


def test_chat_opens_an_adapter_with_its_bases_tokenizer_and_says_so(adapter, bases, capsys):
    conversation = start(adapter, "--prompt", "Hello")
    assert f"adapter    {adapter}, merged with its base {bases['llama3']}" in capsys.readouterr().err
    assert conversation.format == "llama3" and not lora.adapters(conversation.model)
    prompt = conversation.render([{"role": "user", "content": "Hello"}])
    conversation.answer("Hello", lambda reply: None)
    model = load_checkpoint(bases["llama3"])
    lora.load_adapter(adapter, model)
    assert conversation.messages[-1]["ids"] == scratch(SimpleNamespace(
        model=model, max_new_tokens=12, stops=conversation.stops, is_silent=conversation.is_silent), prompt)
    assert start(adapter / "adapter_model.safetensors").format == "llama3"      # a file of it is enough


def test_a_base_that_moved_is_named_by_base(adapter, bases, tmp_path, capsys):
    moved = shutil.copytree(bases["llama3"], tmp_path / "elsewhere")
    change_config(adapter, base_model_name_or_path="/old/place/llama")
    assert_fails(capsys, [adapter], "is an adapter of /old/place/llama, which is not there: --base DIR")
    assert start(adapter, "--base", moved).format == "llama3"
    assert_fails(capsys, [adapter, "--base", tmp_path / "none"], "--base", "none does not exist")
    assert_fails(capsys, [bases["llama3"], "--base", moved], "--base is for adapters")
    assert_fails(capsys, [adapter, "--base", bases["gpt"]], "was it made for another model")
    change_config(adapter, base_model_name_or_path=None)
    assert_fails(capsys, [adapter], "does not say of what: --base DIR names its base")
    other = shutil.copytree(adapter, tmp_path / "other")
    assert_fails(capsys, [adapter, "--base", other], "which is one itself: merge that")
    change_config(adapter, base_model_name_or_path="nobody/nothing-of-this-name")
    assert_fails(capsys, [adapter], "adapter of nobody/nothing-of-this-name, which is not there")


def test_an_adapters_own_tokenizer_and_settings_go_before_the_bases(adapter, bases):
    tokenizer = load_tokenizer(bases["llama3"])
    tokenizer.chat_format = None
    tokenizer.save(adapter)
    (adapter / "generation_config.json").write_text('{"temperature": 0.3, "eos_token_id": [7, 9]}')
    conversation = start(adapter, greedy=False)
    assert conversation.format is None and conversation.sampling["temperature"] == 0.3
    assert {7, 9} <= conversation.stops


def test_an_adapters_tokenizer_without_a_format_converses_as_the_base(adapter, bases):
    load_tokenizer(bases["llama3"]).save(adapter)
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    del config["chat_format"]
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    (adapter / "generation_config.json").write_text('{"eos_token_id": [341, 344]}')
    assert start(adapter).format == "llama3"


def test_a_folder_with_an_adapter_and_a_model_is_refused_until_one_is_named(adapter, bases, capsys):
    model = load_checkpoint(bases["llama3"])
    model.save_pretrained(adapter)
    load_tokenizer(bases["llama3"]).save(adapter)
    assert_fails(capsys, [adapter], "holds an adapter and a model: give the path of one", "adapter_config.json")
    merged = start(adapter / "adapter_config.json").model(TOKENS)
    assert torch.equal(start(adapter / "model.safetensors").model(TOKENS), model(TOKENS))
    assert not torch.allclose(merged, model(TOKENS))


def test_an_adapter_of_a_recurrent_model_just_works(tmp_path):
    make_model("rwkv6", 273).save_pretrained(tmp_path / "base")
    write_world(tmp_path / "base")
    expected = make_adapter(tmp_path / "base", tmp_path / "adapter")(TOKENS)
    assert_close(start(tmp_path / "adapter").model(TOKENS), expected, 2e-5)


def test_a_classifier_says_what_to_do_with_it(bases, tmp_path, capsys):
    folder = shutil.copytree(bases["gpt"], tmp_path / "run")
    save_file({"weight": torch.zeros(2, 32)}, folder / "head.safetensors", {"labels": '["a", "b"]'})
    assert_fails(capsys, [folder], "labels texts, it does not write any: python finetune.py --task classify "
                                   f"--init-from {folder} --predict FILE")


def test_merging_unties_nothing_that_is_tied(bases, tmp_path):
    make_adapter(bases["gpt"], tmp_path / "adapter")
    model = lora.load_merged(tmp_path / "adapter", bases["gpt"])
    assert model.config == replace(model.config, tie_word_embeddings=True)
    assert model.lm_head.weight is model.wte.weight


def test_inspect_shows_an_adapter_and_its_base(adapter, bases, capsys):
    with pytest.raises(SystemExit) as ended:
        chat.main([str(adapter), "--inspect", "--device", "cpu"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and f"adapter    LoRA of rank 3 on 14 layers, to be merged with {bases['llama3']}" in told
    change_config(adapter, use_dora=True)
    with pytest.raises(SystemExit) as ended:
        chat.main([str(adapter), "--inspect", "--device", "cpu"])
    told = capsys.readouterr().out
    assert ended.value.code == 2 and "adapter    would not load:" in told and "use_dora" in told and "stops at" in told
