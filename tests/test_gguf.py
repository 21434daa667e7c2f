"""practice/gguf.py: llama.cpp computes our logits and our tokens from a GGUF file."""
import pickle
import random
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, assert_one_line_error, continuation, run, run_here
from test_chat import TEXT, make_tokenizer, write_world

from checkpoints import load_checkpoint
from glm4 import GLM4, GLM4Config
from gpt import GPT, GPTConfig
from llama3 import Llama3, Llama3Config
from practice import gguf as ours
from rwkv6 import RWKV6, RWKV6Config
from tokenizer import GPT2_PATTERN, ByteBPE, Bytes, Characters, load_tokenizer, train_bpe

KINDS = {
    "gpt": lambda V: GPT(GPTConfig.sized(2, 64, V, 256)),
    "gpt without biases": lambda V: GPT(replace(GPTConfig.sized(2, 64, V, 256), bias=False)),
    "gpt with a head": lambda V: GPT(replace(GPTConfig.sized(2, 64, V, 256), n_head=4, n_inner=96,
                                             tie_word_embeddings=False)),
    "llama3": lambda V: Llama3(replace(Llama3Config.sized(2, 64, V, 256), num_attention_heads=4,
                                       num_key_value_heads=2, head_dim=16)),
    "llama3.1": lambda V: Llama3(replace(
        Llama3Config.sized(2, 64, V, 256), num_attention_heads=4, num_key_value_heads=1,
        head_dim=32, rope_factor=8.0, rope_original_max_position_embeddings=64,
        tie_word_embeddings=False)),
    "glm4": lambda V: GLM4(replace(GLM4Config.sized(2, 64, V, 256), num_attention_heads=4,
                                   num_key_value_heads=2, head_dim=16)),
    "glm4-0414": lambda V: GLM4(replace(
        GLM4Config.sized(2, 64, V, 256), num_attention_heads=2, num_key_value_heads=1, head_dim=64,
        sandwich_norms=True, attention_bias=False, rms_norm_eps=1e-5)),
    "rwkv6": lambda V: RWKV6(RWKV6Config.sized(2, 64, V, 256)),
    "rwkv6 with heads": lambda V: RWKV6(replace(RWKV6Config.sized(2, 128, V, 256), head_size=64)),
}
# ggml looks GELU up in a table of 16-bit floats; the others differ by the order of sums
TOLERANCE = {"gpt": 2e-3, "llama": 2e-5, "glm4": 2e-5, "rwkv6": 2e-4}


def family(kind):
    return next(name for name in TOLERANCE if kind.startswith(name))
TEXTS = [
    "Hello, world!", "  two  spaces and a tab\t", "don't DON'T we'll I'M they'VE", "12345 3.14 1e10",
    "a\n\n\nb\r\n\r\n  c \n", "def f(x):\n    return x ** 2  # twice\n", "Ünïcödé, naïve, 中文字符, 日本語",
    "🙂👩‍👩‍👧 emoji", "!!!???...---", "x" * 50, " ", "\n", "", "α²β³ ½ ٣٤", "e\u0301 \u00a0nbsp \u3000wide",
    "<|endoftext|> and <|eot_id|>", "### Instruction:\nhi\n\n### Response: How are you?"]


def random_texts(count):
    draw = random.Random(1)
    letters = ["a", "B", "é", "'s", "'LL", " ", "  ", "\n", "\t", "1", "23", "!", "?.", "中", "🙂", "_"]
    return ["".join(draw.choices(letters, k=draw.randint(1, 30))) for _ in range(count)]


def make(kind, vocabulary_size):
    """A model with weights large enough that its distributions are peaked and differ."""
    torch.manual_seed(0)
    model = KINDS[kind](vocabulary_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "wte.weight" or name.endswith("embed_tokens.weight"):
                parameter.normal_(std=0.3)   # where it is the head too, tokens repeat themselves
            elif name in ("emb.weight", "wpe.weight"):
                parameter.normal_()
            elif parameter.dim() == 1:       # norms and biases too
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif "time_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def vocabulary(kind, golden, folder):
    if kind.startswith("rwkv6"):
        write_world(folder)
        return load_tokenizer(folder)
    return make_tokenizer(family(kind).replace("llama", "llama3"), golden)


def opened(path, **more):
    llama_cpp = pytest.importorskip("llama_cpp")
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False}      # fp32, as we have it on the CPU
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False,
                           **{**exact, **more})


@pytest.fixture
def written(tmp_path, golden):
    pytest.importorskip("gguf")

    def write(kind, tokenizer=None, type_=None):
        tokenizer = tokenizer or vocabulary(kind, golden, tmp_path)
        model = make(kind, tokenizer.vocab_size + 3)         # rows without tokens, as padding
        lines = ours.write(model, tokenizer, tmp_path / "a.gguf", type_)
        return model, tokenizer, tmp_path / "a.gguf", lines
    return write


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_our_logits_and_draws_our_tokens(kind, written):
    model, tokenizer, path, lines = written(kind)
    theirs = opened(path)
    ids = torch.randint(256, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    theirs.eval(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    assert_close(torch.tensor(theirs.scores[:150]), expected, TOLERANCE[family(kind)], kind)
    expected = continuation(model, ids[:20], 30)
    theirs.reset()
    drawn = [token for token, _ in zip(theirs.generate(ids[:20], top_k=1), range(30))]
    assert drawn == expected and len({*drawn}) > 5
    theirs.close()


@pytest.mark.parametrize("kind", ["gpt", "llama3", "glm4", "rwkv6"])
def test_llama_cpp_reads_text_as_our_tokens(kind, written):
    _, tokenizer, path, _ = written(kind)
    theirs = opened(path)
    for text in [*TEXTS, *random_texts(300)]:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    theirs.close()


@pytest.mark.parametrize("name", ["bytes", "gpt2's pattern", "trained on text"])
def test_the_vocabularies_of_train_py_are_read_as_they_are_here(name, written):
    texts = [TEXT, "don't we'll 12345 1e10 \n\n\n  c naïve 中文 def f(x):\n    return x"] * 3
    tokenizer = {"bytes": Bytes, "trained on text": lambda: train_bpe(texts, 400),
                 "gpt2's pattern": lambda: train_bpe(texts, 400, pattern=GPT2_PATTERN)}[name]()
    _, _, path, _ = written("gpt", tokenizer)
    theirs = opened(path)
    for text in [*TEXTS, *random_texts(300)]:
        ids = tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ids
        assert theirs.detokenize(ids, special=True).decode("utf-8", "replace") == text or not text
    theirs.close()


def test_the_one_known_difference_is_said_and_is_the_only_one(written):
    """ſ is an s to Unicode's case folding, which llama.cpp's patterns do not have."""
    tokenizer = train_bpe(["'ſt 'ſ t ſt'ſt " * 9], 280)
    _, _, path, lines = written("gpt", tokenizer)
    assert any("ſ" in line for line in lines if line.startswith("differs"))
    theirs = opened(path)
    assert theirs.tokenize("a'ſt".encode(), add_bos=False) != tokenizer.encode("a'ſt")
    theirs.close()


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_matrices_in_16_bits_are_half_the_size_and_nearly_the_same(type_, written):
    model, _, path, _ = written("llama3", None, type_)
    theirs, ids = opened(path), [*range(60)]
    theirs.eval(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    assert_close(torch.tensor(theirs.scores[:60]), expected, 5e-2, type_)
    theirs.close()
    assert path.stat().st_size < 0.6 * sum(p.nbytes for p in model.parameters()) + 40_000


def test_what_a_run_says_of_itself_is_in_the_file(written, golden):
    gguf = pytest.importorskip("gguf")
    tokenizer = make_tokenizer("llama3", golden)
    tokenizer.template = type("Template", (), {"source": "{{ messages }}"})
    _, _, path, lines = written("llama3", tokenizer)
    fields = gguf.GGUFReader(path).fields
    stated = {name: field.contents() for name, field in fields.items()}
    assert stated["general.architecture"] == "llama" and stated["llama.context_length"] == 256
    assert stated["tokenizer.chat_template"] == "{{ messages }}"
    assert stated["tokenizer.ggml.bos_token_id"] == tokenizer.bos_id
    assert stated["tokenizer.ggml.eos_token_id"] == tokenizer.end_id
    assert stated["tokenizer.ggml.eot_token_id"] == tokenizer.special_ids["<|eot_id|>"]
    assert stated["tokenizer.ggml.add_bos_token"] is True
    assert not any("chat template" in line for line in lines if line.startswith("differs"))


def test_control_tokens_are_read_from_text_only_where_they_are_asked_for(written, golden):
    tokenizer = make_tokenizer("llama3", golden)
    _, _, path, _ = written("llama3", tokenizer)
    theirs, name = opened(path), "<|eot_id|>"
    assert theirs.tokenize(name.encode(), add_bos=False, special=False) == tokenizer.encode(name)
    assert theirs.tokenize(name.encode(), add_bos=True, special=True) == [
        tokenizer.bos_id, tokenizer.special_ids[name]]
    theirs.close()


@pytest.mark.parametrize("kind, change, words", [
    ("gpt", {"activation_function": "gelu"}, "tanh form"),
    ("rwkv6", {"group_norm_eps": 1e-5}, "group_norm_eps"),
    ("rwkv6", {"tuned_state": True}, "tuned_state"),
    ("glm4", {"head_dim": 32}, "as wide as the model"),
])
def test_what_llama_cpp_would_compute_otherwise_is_refused(kind, change, words):
    model = make(kind, 64)
    changed = type(model)(replace(model.config, **change))
    with pytest.raises(ValueError, match=words):
        ours.describe(changed)


def test_vocabularies_that_llama_cpp_does_not_have_are_refused(golden):
    gguf = pytest.importorskip("gguf")
    strange = train_bpe([TEXT], 300, pattern=r"\w+|\W+")
    with pytest.raises(ValueError, match="split patterns"):
        ours.vocabulary(strange, 400, gguf.TokenType)
    characters = Characters(pickle.dumps({"stoi": {"a": 0, "b": 1}}), "meta.pkl")
    with pytest.raises(ValueError, match="Characters"):
        ours.vocabulary(characters, 2, gguf.TokenType)
    twice = ByteBPE({bytes([n]): n for n in range(256)}, GPT2_PATTERN, {"a": 256}, 256)
    with pytest.raises(ValueError, match="written alike"):
        ours.vocabulary(twice, 257, gguf.TokenType)


def test_the_command_says_what_it_wrote_and_what_to_do_next(tmp_path, golden):
    pytest.importorskip("gguf")
    tokenizer = make_tokenizer("gpt", golden)
    make("gpt", tokenizer.vocab_size).save_pretrained(tmp_path / "run")
    tokenizer.save(tmp_path / "run")
    done = run_here(ours.main, tmp_path / "run", tmp_path / "run.gguf")
    assert done.returncode == 0, done.stderr
    for word in ("gpt2", "matrices in f32", "ollama create run", "differs"):
        assert word in done.stdout
    theirs, ids = opened(tmp_path / "run.gguf"), [*range(50)]
    theirs.eval(ids)
    with torch.no_grad():
        expected = load_checkpoint(tmp_path / "run", "cpu")(torch.tensor([ids]))[0]
    assert_close(torch.tensor(theirs.scores[:50]), expected, TOLERANCE["gpt"])
    theirs.close()
    for run_dir, out, words in (("run", "run.gguf", "exists: choose another name"),
                                ("run", "run.bin", "ends in .gguf"), ("run", "no/a.gguf", "folder"),
                                ("no", "b.gguf", "does not exist")):
        assert_one_line_error(run_here(ours.main, tmp_path / run_dir, tmp_path / out),
                              "practice.gguf", words)
    assert not [*tmp_path.glob("*.part")]


@pytest.mark.slow
def test_the_module_finds_the_package_of_its_own_name(tmp_path):
    pytest.importorskip("gguf")
    make("gpt", 257).save_pretrained(tmp_path / "run")
    Bytes().save(tmp_path / "run")
    done = run("-m", "practice.gguf", tmp_path / "run", tmp_path / "run.gguf")
    assert done.returncode == 0 and (tmp_path / "run.gguf").exists(), done.stderr
