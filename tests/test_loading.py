"""Every way in which users' weights lie on disk: loaded right, or refused with the reason."""
import argparse
import json
import os
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import NumpyDtype, identify, load_checkpoint, numpy_number, read_pickle
from glm4 import GLM4, GLM4Config
from gpt import GPT, GPTConfig
from llama3 import Llama3, Llama3Config
from rwkv6 import RWKV6, RWKV6Config

MODELS = {"gpt": (GPT, GPTConfig), "llama3": (Llama3, Llama3Config), "glm4": (GLM4, GLM4Config)}
TOKENS = torch.arange(20)[None]


def tiny(name, **changes):
    torch.manual_seed(0)
    model_class, config_class = MODELS[name]
    return model_class(replace(config_class.sized(2, 64, 61, 40), **changes)).eval()


def put_on_disk(name, folder, change=None, file="model.safetensors", **changes):
    """A checkpoint of this model whose tensors `change` has edited; the model."""
    model = tiny(name, **changes)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) if change else tensors
    (folder / "model.safetensors").unlink()
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    return model


def nanogpt(model, args=None, **more):
    """What nanoGPT's train.py saves of this model."""
    c, tensors = model.config, model.state_dict()
    sizes = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.n_positions,
                 bias=c.bias, vocab_size=c.vocab_size, dropout=0.0)
    names = {n if n.startswith("lm_head") else f"transformer.{n}": t for n, t in tensors.items()}
    return {"model": names, "model_args": sizes if args is None else args, "iter_num": 7,
            "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x"}, **more}


def same(model, other):
    return torch.equal(model(TOKENS), other(TOKENS))


def message(path, **options):
    """The one line that says why it is not loaded."""
    with pytest.raises((ValueError, OSError)) as caught:
        load_checkpoint(path, **options)
    told = str(caught.value)
    assert "\n" not in told and "\x1b" not in told and 20 < len(told) < 600, told
    return told


# --- one dtype ---

def norms_in_fp32(tensors):
    return {n: t.float() if "norm" in n or "ln_" in n else t.bfloat16() for n, t in tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_two_dtypes_are_united_as_config_or_most_of_them_say(name, tmp_path, capsys):
    put_on_disk(name, tmp_path, norms_in_fp32)
    file = tmp_path / "config.json"
    stated = json.loads(file.read_text())
    for field, value, want in (("torch_dtype", None, torch.bfloat16),
                               ("torch_dtype", "float32", torch.float32),
                               ("dtype", "float16", torch.float16),     # transformers 5's name
                               ("dtype", "auto", torch.bfloat16)):
        file.write_text(json.dumps({**stated, "torch_dtype": None, "dtype": None, field: value}))
        model = load_checkpoint(tmp_path)
        assert {p.dtype for p in model.parameters()} == {want}
        assert model(TOKENS).dtype == want
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "several dtypes" in told and "bfloat16" in told
    assert {p.dtype for p in load_checkpoint(tmp_path, dtype=torch.float64).parameters()} == \
        {torch.float64} and capsys.readouterr().err == ""


def test_a_file_of_one_dtype_keeps_it_whatever_config_says(tmp_path, capsys):
    put_on_disk("llama3", tmp_path, lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
    assert load_checkpoint(tmp_path).lm_head.weight.dtype == torch.bfloat16
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", MODELS)
def test_a_tied_head_stored_in_another_dtype_stays_tied(name, tmp_path):
    table = "wte.weight" if name == "gpt" else "model.embed_tokens.weight"

    def add_head(tensors):
        tensors = {n: t.bfloat16() for n, t in tensors.items()}
        return {**tensors, "lm_head.weight": tensors[table].float()}
    put_on_disk(name, tmp_path, add_head, tie_word_embeddings=True)
    model = load_checkpoint(tmp_path)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.get_parameter(table)
    assert model(TOKENS).dtype in (torch.bfloat16, torch.float32)


def test_a_tied_head_that_is_not_stored_is_tied_whatever_the_table_holds(tmp_path):
    """Comparing would read the whole table, and find that NaN differs from NaN."""
    model = tiny("gpt")
    with torch.no_grad():
        model.wte.weight[60, 0] = float("nan")
    model.save_pretrained(tmp_path)
    again = load_checkpoint(tmp_path)
    assert again.config.tie_word_embeddings and again.lm_head.weight is again.wte.weight


# --- saving where something lies ---

@pytest.mark.parametrize("name", MODELS)
def test_saving_over_the_file_it_was_loaded_from_keeps_the_mapped_weights(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    want = model(TOKENS)
    for _ in range(2):                       # over the file that is mapped just now
        model.save_pretrained(tmp_path)
        assert torch.equal(model(TOKENS), want)
        assert torch.equal(load_checkpoint(tmp_path)(TOKENS), want)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(tmp_path)
    assert same(load_checkpoint(tmp_path), model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("older", ["ckpt.pt", "consolidated.00.pth", "model.safetensors.index.json"])
def test_saving_beside_weights_that_would_be_read_instead_is_refused(name, older, tmp_path):
    (tmp_path / older).write_text("{}")
    with pytest.raises(ValueError, match=f"{older}, which may be read instead"):
        tiny(name).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [older]        # nothing was written


def test_an_rwkv_is_not_saved_beside_another_pth(tmp_path):
    model = RWKV6(RWKV6Config.sized(1, 64, 61, 40))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)                                     # its own model.pth: replaced
    os.rename(tmp_path / "model.pth", tmp_path / "RWKV-x060-tiny.pth")
    with pytest.raises(ValueError, match="RWKV-x060-tiny.pth"):
        model.save_pretrained(tmp_path)


def test_several_candidates_in_a_folder_are_named(tmp_path):
    model = tiny("gpt")
    model.save_pretrained(tmp_path / "a")
    torch.save(nanogpt(model), tmp_path / "a/ckpt.pt")
    told = message(tmp_path / "a")
    assert "ckpt.pt" in told and "model.safetensors" in told
    assert load_checkpoint(tmp_path / "a/ckpt.pt").config.activation_function == "gelu"
    assert load_checkpoint(tmp_path / "a/model.safetensors").config == model.config
    tiny("llama3").save_pretrained(tmp_path / "b")
    torch.save({}, tmp_path / "b/consolidated.00.pth")
    told = message(tmp_path / "b")
    assert "consolidated.00.pth" in told and "model.safetensors" in told


# --- nanoGPT ---

def test_a_head_of_its_own_in_nanogpt_is_loaded_as_such(tmp_path):
    model = tiny("gpt", activation_function="gelu", tie_word_embeddings=False)
    torch.save(nanogpt(model), tmp_path / "ckpt.pt")
    again = load_checkpoint(tmp_path)
    assert not again.config.tie_word_embeddings and same(again, model)
    tied = tiny("gpt", activation_function="gelu")                      # nanoGPT stores both names
    torch.save(nanogpt(tied), tmp_path / "ckpt.pt")
    again = load_checkpoint(tmp_path)
    assert again.config.tie_word_embeddings and again.lm_head.weight is again.wte.weight
    assert same(again, tied)


def test_a_stored_head_that_differs_wins_in_a_tied_hugging_face_gpt2(tmp_path):
    model = put_on_disk("gpt", tmp_path, lambda t: {**t, "lm_head.weight": -t["wte.weight"]})
    again = load_checkpoint(tmp_path)
    assert not again.config.tie_word_embeddings and torch.equal(again(TOKENS), -model(TOKENS))


@pytest.mark.parametrize("name, value", [("use_rope", True), ("n_kv_head", 2), ("flash", False)])
def test_unknown_model_args_are_refused_by_name(name, value, tmp_path):
    content = nanogpt(tiny("gpt"))
    content["model_args"][name] = value
    torch.save(content, tmp_path / "ckpt.pt")
    assert name in message(tmp_path)


@pytest.mark.parametrize("left_out", [("bias",), ("bias", "vocab_size")])
def test_nanogpt_before_bias_has_the_tanh_gelu(left_out, tmp_path):
    """bias came on 27 January 2023 (cc5444e), vocab_size on the 14th (57735f5), nn.GELU in June."""
    model = tiny("gpt", tie_word_embeddings=False)                      # tied on 14 January (7c82885)
    content = nanogpt(model)
    for name in left_out:
        del content["model_args"][name]
    torch.save(content, tmp_path / "ckpt.pt")
    again = load_checkpoint(tmp_path)
    assert again.config == model.config and same(again, model)


# --- wrappers ---

WRAPPED = {
    "orig_mod": "_orig_mod.{}", "ddp": "module.{}", "deepspeed": "_forward_module.{}",
    "ddp of compiled": "module._orig_mod.{}", "compiled ddp": "_orig_mod.module.{}",
    "all": "_forward_module._orig_mod.module.{}", "fsdp": "_fsdp_wrapped_module.{}",
    "lightning": "model.{}", "twice": "model.model.{}", "compiled inside": "model._orig_mod.{}"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("bare", [False, True])
def test_names_behind_wrappers_are_stripped_once_for_every_model(name, wrapper, bare, tmp_path):
    def wrap(tensors):
        names = {n: n.removeprefix("model.") if bare else n for n in tensors}
        return {WRAPPED[wrapper].format(names[n]): t for n, t in tensors.items()}
    model = put_on_disk(name, tmp_path, wrap)
    assert same(load_checkpoint(tmp_path), model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("inner", ["_orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_wrappers_of_single_layers_are_stripped(name, inner, tmp_path):
    """As FSDP's auto wrap, activation checkpointing and a compile of each block leave them."""
    def wrap(tensors):
        return {re.sub(r"(layers|h)\.(\d+)\.", rf"\1.\2.{inner}", n): t for n, t in tensors.items()}
    model = put_on_disk(name, tmp_path, wrap)
    assert any(f"1.{inner}" in n for n in load_file(tmp_path / "model.safetensors"))
    assert same(load_checkpoint(tmp_path), model)


@pytest.mark.parametrize("name", ["rwkv2", "rwkv3", "rwkv4", "rwkv5", "rwkv6"])
@pytest.mark.parametrize("wrapper", [w for w in WRAPPED if w != "bare"])
def test_the_same_wrappers_around_an_rwkv(name, wrapper, golden, tmp_path):
    file = golden / name / "weights.pth"
    tensors = {WRAPPED[wrapper].format(n): t for n, t in torch.load(file).items()}
    tensors = {re.sub(r"blocks\.(\d+)\.", r"blocks.\1._orig_mod.", n): t for n, t in tensors.items()}
    torch.save({"state_dict": tensors}, tmp_path / "weights.pth")
    assert same(load_checkpoint(tmp_path), load_checkpoint(file))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
def test_a_dict_around_the_weights_is_opened(name, key, tmp_path):
    model = put_on_disk(name, tmp_path, lambda t: {key: t, "epoch": 3, "optimizer": {"state": {}}},
                        "pytorch_model.bin")
    assert same(load_checkpoint(tmp_path), model)
    os.rename(tmp_path / "pytorch_model.bin", tmp_path / "epoch=3.ckpt")
    assert same(load_checkpoint(tmp_path / "epoch=3.ckpt"), model)
    os.rename(tmp_path / "epoch=3.ckpt", tmp_path / "checkpoint.pt")    # not nanoGPT's
    assert same(load_checkpoint(tmp_path / "checkpoint.pt"), model)


@pytest.mark.parametrize("name", MODELS)
def test_one_weight_behind_two_prefixes_is_refused(name, tmp_path):
    put_on_disk(name, tmp_path, lambda t: {**t, **{f"module.{n}": -x for n, x in t.items()}})
    assert "twice, behind different prefixes" in message(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_second_model_beside_the_first_is_refused(name, tmp_path):
    """As what DPO trainers and averages of weights leave in one file."""
    put_on_disk(name, tmp_path, lambda t: {**t, **{f"ema.{n}": -x for n, x in t.items()}})
    assert "ema." in message(tmp_path)


# --- Meta ---

def write_meta(model, folder):
    """params.json and consolidated.00.pth, as bench/load_memory.py writes them."""
    from bench.load_memory import write_meta
    write_meta(model, folder)


def test_metas_original_is_found_alone_and_inside_a_hugging_face_folder(tmp_path):
    model = tiny("llama3")
    write_meta(model, tmp_path / "repository/original")
    for path in ("repository", "repository/original", "repository/original/consolidated.00.pth"):
        assert identify(tmp_path / path) == "llama3"
        assert same(load_checkpoint(tmp_path / path), model), path
    model.save_pretrained(tmp_path / "copy")
    os.rename(tmp_path / "copy/config.json", tmp_path / "repository/config.json")
    assert same(load_checkpoint(tmp_path / "repository"), model)
    other = tiny("llama3", rms_norm_eps=0.1)
    other.save_pretrained(tmp_path / "repository")                      # the repository's own weights
    assert same(load_checkpoint(tmp_path / "repository"), other)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_metas_names_behind_wrappers_load(prefix, tmp_path):
    model = tiny("llama3")
    write_meta(model, tmp_path)
    file = tmp_path / "consolidated.00.pth"
    torch.save({"model": {prefix + n: t for n, t in torch.load(file).items()}}, file)
    assert same(load_checkpoint(tmp_path), model)


# --- what lies beside the weights in a pickle ---

@pytest.mark.parametrize("value", [np.float64(1.5), np.float32(1.5), np.int64(3), np.bool_(True),
                                   np.str_("x"), np.arange(3), np.random.get_state(),
                                   np.array(["a", None], object)], ids=lambda v: type(v).__name__)
def test_numpy_values_beside_the_weights_do_no_harm(value, tmp_path):
    model = tiny("gpt", activation_function="gelu")
    torch.save(nanogpt(model, best=value), tmp_path / "ckpt.pt")
    assert same(load_checkpoint(tmp_path), model)
    if isinstance(value, (np.number, np.bool_)):
        assert read_pickle(tmp_path / "ckpt.pt")["best"] == value.item()


def test_sizes_as_numpy_scalars_are_numbers(tmp_path):
    model = tiny("gpt", activation_function="gelu")
    content = nanogpt(model)
    content["model_args"] = {n: np.int16(v) if type(v) is int else v
                             for n, v in content["model_args"].items()}
    torch.save(content, tmp_path / "ckpt.pt")
    assert same(load_checkpoint(tmp_path), model)
    big = NumpyDtype("i4")
    big.__setstate__((3, ">", None, None, None, -1, -1, 0))             # from another machine
    assert numpy_number(big, b"\0\0\1\0") == 256


class Settings:
    """A user's class, as pickled with the weights."""


@pytest.mark.parametrize("value, words", [
    (argparse.Namespace(lr=1), "argparse.Namespace"), (Settings(), "Settings"),
    (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear")])
def test_an_object_in_a_pickle_is_named_and_nothing_of_it_is_executed(value, words, tmp_path):
    torch.save(nanogpt(tiny("gpt"), args_=value), tmp_path / "ckpt.pt")
    told = message(tmp_path)
    assert words in told and "nothing in a file is executed" in told and "damaged" not in told
    assert "state_dict" in told and "weights_only" not in told


def test_a_pickled_call_is_named_and_not_made(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))
    torch.save(nanogpt(tiny("gpt"), evil=Evil()), tmp_path / "ckpt.pt")
    assert f"would call {os.mkdir.__module__}.mkdir" in message(tmp_path)
    assert not (tmp_path / "made").exists()


# --- what is refused by name ---

def tiny_file(path, content=b"\0" * 64):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


OTHERS = {
    "lit_model.pth": (b"", "litgpt convert_from_litgpt"), "model.gguf": (b"GGUF\3\0\0\0", "gguf_file"),
    "ggml-model-q4_0.bin": (b"tjgg\3\0\0\0", "convert_llama_ggml_to_gguf"),
    "ggml-old.bin": (b"lmgg\3\0\0\0", "convert_llama_ggml_to_gguf"),
    "gpt2_124M.bin": (struct.pack("<ii", 20240326, 3), "export_hf.py"),
    "stories15M.bin": (struct.pack("<Ii", 0x616b3432, 1), "export.py --hf"),
    "weights.00.npz": (b"PK\3\4", "mlx_lm.convert"),
    "model.ckpt.data-00000-of-00001": (b"", "convert_gpt2_original_tf_checkpoint_to_pytorch"),
    "tf_model.h5": (b"\x89HDF", "from_tf=True"), "flax_model.msgpack": (b"", "from_flax=True"),
    "global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt": (b"PK\3\4", "zero_to_fp32.py"),
    "__0_0.distcp": (b"PK\3\4", "dcp_to_torch")}


@pytest.mark.parametrize("file", OTHERS)
@pytest.mark.parametrize("config", [False, True])
def test_formats_of_others_are_refused_by_name_with_what_converts_them(file, config, tmp_path):
    begin, tool = OTHERS[file]
    tiny_file(tmp_path / file, begin + b"\0" * 64)
    if config:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path, tmp_path / file):
        told = message(path)
        assert tool in told and "not read here" in told, told


def test_formats_of_others_beside_weights_of_ours_do_not_matter(tmp_path):
    model = tiny("llama3")
    model.save_pretrained(tmp_path)
    for file, (begin, _) in OTHERS.items():
        tiny_file(tmp_path / file, begin)
    assert same(load_checkpoint(tmp_path), model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("file, content, words", [
    ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ("config.json", {"quantization_config": {"quant_method": "awq"}}, "awq"),
    ("config.json", {"quantization_config": {"load_in_4bit": True}}, "quantised"),
    ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "mlx_lm.convert --dequantize"),
    ("quantize_config.json", {"bits": 4, "group_size": 128}, "4 bits"),
    ("quant_config.json", {"w_bit": 4}, "4 bits")])
def test_quantised_folders_are_refused_by_name(name, file, content, words, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **content}))
    told = message(tmp_path)
    assert words in told and "quantised" in told and str(path) in told


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, words", [
    (torch.int32, "integers"), (torch.float8_e4m3fn, "8 bits")])
def test_weights_of_few_bits_are_refused_where_no_config_tells_of_them(name, dtype, words, tmp_path):
    put_on_disk(name, tmp_path, lambda tensors: {
        n: t.to(dtype) if "proj" in n or "c_fc" in n else t for n, t in tensors.items()})
    told = message(tmp_path)
    assert words in told and "quantised" in told


# --- layouts that nobody published: each loads to the same logits, or the message says what to do ---

def in_parts(folder, ending="safetensors", stem="model"):
    """Two parts, and no index of them."""
    tiny("llama3").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i in (1, 2):
        part = {n: tensors[n] for n in sorted(tensors)[i - 1::2]}
        save = save_file if ending == "safetensors" else torch.save
        save(part, folder / f"{stem}-{i:05}-of-00002.{ending}")


@pytest.mark.parametrize("ending, stem", [("safetensors", "model"), ("bin", "pytorch_model")])
def test_parts_without_their_index_are_named(ending, stem, tmp_path):
    in_parts(tmp_path, ending, stem)
    told = message(tmp_path)
    assert f"{stem}-00001-of-00002.{ending}" in told and "index" in told


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("file", ["model.fp16.safetensors", "weights.safetensors", "model.bin",
                                  "model.pth", "last.ckpt", "model.pt"])
def test_weights_of_another_file_name_are_named_and_load_by_path(name, file, tmp_path):
    model = put_on_disk(name, tmp_path, file=file)
    assert f"the folder holds {file}" in message(tmp_path)
    assert same(load_checkpoint(tmp_path / file), model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("keys", [("state_dict", "model"), ("model", "state_dict"), ("module", "model")])
def test_two_dicts_around_the_weights_are_opened(name, keys, tmp_path):
    model = put_on_disk(name, tmp_path, lambda t: {keys[0]: {keys[1]: {
        f"module.{n}": x for n, x in t.items()}, "step": 3}}, "pytorch_model.bin")
    assert same(load_checkpoint(tmp_path), model)


def test_a_model_merged_inside_peft_loads_and_an_unmerged_one_is_refused(tmp_path):
    def inside(tensors):
        return {f"base_model.model.{n}": t for n, t in tensors.items()}
    model = put_on_disk("llama3", tmp_path, inside)
    assert same(load_checkpoint(tmp_path), model)
    put_on_disk("llama3", tmp_path, lambda tensors: inside(
        {**tensors, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 64)}))
    assert "lora_A" in message(tmp_path)


def test_a_folder_of_hugging_faces_trainer_is_a_checkpoint(tmp_path):
    model = tiny("llama3")
    model.save_pretrained(tmp_path)
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"a": argparse.Namespace(lr=1)}, tmp_path / file)
    assert same(load_checkpoint(tmp_path), model)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "the folder holds optimizer.pt" in message(tmp_path)


@pytest.mark.parametrize("content, words", [
    (lambda model: model, "gpt.GPT"), (lambda model: (nanogpt(model), 3), "a tuple, not a dict"),
    (lambda model: torch.zeros(2), "Tensor, not a dict")])
def test_a_ckpt_that_holds_no_dict_is_named(content, words, tmp_path):
    torch.save(content(tiny("gpt")), tmp_path / "ckpt.pt")
    assert words in message(tmp_path)


@pytest.mark.parametrize("change, words", [
    (lambda n, t: (n.replace("gate_proj", "w1"), t), "w1"),             # names of one's own
    (lambda n, t: (n, torch.zeros(0)), "size mismatch"),                # ZeRO-3 left them empty
    (lambda n, t: (n, t.new_zeros(64, 64) if "embed" in n else t), "61, 64")])  # config not resized
def test_tensors_that_do_not_fit_the_config_are_named(change, words, tmp_path):
    put_on_disk("llama3", tmp_path, lambda tensors: dict(
        change(n, t) for n, t in tensors.items()))
    assert words in message(tmp_path)
