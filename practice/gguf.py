"""A run, or any checkpoint, as a GGUF file: for llama.cpp, Ollama and what else is built on it.

    python -m practice.gguf out/llama3 out/llama3.gguf

llama.cpp's own converter knows published vocabularies by a hash of their tokens and refuses every
other. A vocabulary that was trained here needs only the split pattern to be one that llama.cpp has,
and train_bpe's is equivalent to Llama 3's. What llama.cpp would compute otherwise is refused; what
it does otherwise to unusual text is said.

    our model       architecture      what changes
    gpt             gpt2              biases of 0 where there are none
    llama3          llama             q and k: RoPE turns (2j, 2j + 1) there, (j, j + D / 2) here
    glm4            chatglm, glm4     nothing; the latter has the sandwich norms
    rwkv6           rwkv6             the five shares of token shift are one tensor

Needs the package: pip install gguf. tests/test_gguf.py holds logits and tokens equal to ours.
"""
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from checkpoints import check_vocabulary, eos_tokens, is_out_of_memory, load_checkpoint
from flags import Parser, complain, show_any_text
from folder import Place, gb
from llama3 import inverse_frequency
from lora import load_merged
from tokenizer import (GPT2_PATTERN, GPT4_PATTERN, LLAMA3_PATTERN, STAND_IN, ByteBPE, Bytes, World)

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# ------------------------------------------------------------------------------------------ models


def describe(model) -> tuple[str, dict]:
    """(llama.cpp's architecture, its settings by the names of GGUFWriter.add_...).

    ValueError if llama.cpp would compute something else than this model does.
    """
    c, kind = model.config, type(model).__name__
    if kind == "GPT":
        if c.activation_function == "gelu":
            raise ValueError("llama.cpp's gpt2 has the tanh form of GELU, this model the exact one "
                             "(nanoGPT's): its logits would differ")
        return "gpt2", dict(context_length=c.n_positions, embedding_length=c.n_embd,
                            block_count=c.n_layer, feed_forward_length=c.n_inner,
                            head_count=c.n_head, layer_norm_eps=c.layer_norm_epsilon)
    if kind in ("Llama3", "GLM4"):
        wide = c.num_attention_heads * c.head_dim
        name = "llama" if kind == "Llama3" else "glm4" if c.sandwich_norms else "chatglm"
        if name == "chatglm" and wide != c.hidden_size:
            raise ValueError(f"llama.cpp's chatglm needs heads that are together as wide as the "
                             f"model: {c.num_attention_heads} of {c.head_dim}, {c.hidden_size}")
        rotated = int(c.head_dim * getattr(c, "partial_rotary_factor", 1))
        return name, dict(context_length=c.max_position_embeddings, embedding_length=c.hidden_size,
                          block_count=c.num_hidden_layers, feed_forward_length=c.intermediate_size,
                          head_count=c.num_attention_heads, head_count_kv=c.num_key_value_heads,
                          key_length=c.head_dim, value_length=c.head_dim,
                          layer_norm_rms_eps=c.rms_norm_eps, rope_freq_base=c.rope_theta,
                          rope_dimension_count=rotated)
    if kind == "RWKV6":
        for name, needed in (("group_norm_eps", 64e-5), ("tuned_state", False)):
            if getattr(c, name) != needed:
                raise ValueError(f"llama.cpp's rwkv6 has {name} {needed}, this model "
                                 f"{getattr(c, name)}")
        return "rwkv6", dict(context_length=1 << 20, embedding_length=c.n_embd,   # it has no limit
                             block_count=c.n_layer, feed_forward_length=c.dim_ffn, head_count=0,
                             layer_norm_eps=1e-5, wkv_head_size=c.head_size,
                             time_mix_extra_dim=c.mix_lora, time_decay_extra_dim=c.decay_lora,
                             rescale_every_n_layers=0)
    raise ValueError(f"llama.cpp has no architecture for {kind}: gpt, llama3, glm4 and rwkv6 can "
                     "be converted")


def tensors(model):
    """Yields (a name that gguf's name maps know, tensor) of what llama.cpp loads."""
    c, kind, stored = model.config, type(model).__name__, model.state_dict()
    if getattr(c, "tie_word_embeddings", False):
        del stored["lm_head.weight"]
    if kind == "RWKV6":
        yield from rwkv6_tensors(stored, c.n_layer)
        return
    for name, tensor in stored.items():
        if kind == "Llama3" and ("q_proj" in name or "k_proj" in name):
            heads = tensor.unflatten(0, (-1, 2, c.head_dim // 2))       # (H, 2, D/2, C)
            tensor = heads.transpose(1, 2).flatten(0, 2)
        inside = kind == "GPT" and name != "lm_head.weight"
        yield f"transformer.{name}" if inside else name, tensor
        bias = name.removesuffix("weight") + "bias"
        if kind == "GPT" and not c.bias and bias != name and name[:2] in ("h.", "ln"):
            yield f"transformer.{bias}", tensor.new_zeros(len(tensor))
    if kind == "Llama3" and c.rope_factor != 1:              # what divides each frequency
        unscaled = inverse_frequency(replace(c, rope_factor=1.0))
        yield "rope_freqs.weight", unscaled / inverse_frequency(c)


def rwkv6_tensors(stored: dict, layers: int):
    """The official names as Hugging Face's, which gguf knows; shapes as llama.cpp's operators."""
    new = {"emb": "rwkv.embeddings", "ln_out": "rwkv.ln_out", "ln0": "pre_ln"}
    for layer in range(layers):
        shares = [stored.pop(f"blocks.{layer}.att.time_maa_{name}") for name in "wkvrg"]
        yield f"blk.{layer}.time_mix_lerp_fused.weight", torch.stack(shares)    # (5, 1, 1, C)
    for name, tensor in stored.items():
        name = ".".join(new.get(part, part) for part in name.split("."))
        name = name.replace("blocks.", "rwkv.blocks.").replace(".att.", ".attention.")
        name = name.replace(".ffn.", ".feed_forward.")
        if name.endswith(("maa_w1", "decay_w1", "decay_w2", "maa_w2")):
            tensor = tensor.mT
        elif tensor.dim() == 3:
            tensor = tensor.flatten()
        yield name, tensor

# -------------------------------------------------------------------------------------- vocabulary


def vocabulary(tokenizer, size: int, kinds) -> tuple[dict, list[str]]:
    """({name of GGUFWriter.add_...: value}, what llama.cpp does otherwise).

    size: rows of the embedding. kinds: gguf.TokenType. ValueError if llama.cpp cannot have it.
    """
    notes, about = [], {}
    if isinstance(tokenizer, World):
        about["tokenizer_model"] = "rwkv"
        text = {id: repr(token)[2:-1] for id, token in tokenizer._tokens.items()}
        text[0] = "<s>"                      # has no text; llama.cpp's converter calls it so
    elif isinstance(tokenizer, ByteBPE):
        about["tokenizer_model"], about["tokenizer_pre"] = "gpt2", pre_tokenizer(tokenizer, notes)
        text = {id: "".join(map(STAND_IN.get, token)) for id, token in tokenizer._tokens.items()}
        text |= {id: name for name, id in tokenizer.added.ids.items()}
        pairs = tokenizer._all_merges() if tokenizer._merges is None else tokenizer._merges
        about["token_merges"] = [" ".join("".join(map(STAND_IN.get, part)) for part in pair)
                                 for pair in ([] if isinstance(tokenizer, Bytes) else pairs)
                                 ] or ["<none> <none>"]       # must be some: this one never occurs
    else:
        raise ValueError(f"{type(tokenizer).__name__}: byte-level BPE and RWKV's World can be "
                         "converted; for published SentencePiece models take llama.cpp's "
                         "convert_hf_to_gguf.py")
    special, user = {*tokenizer.special_ids.values()}, {*tokenizer.added.ids.values()}
    about["token_list"] = [text.get(id, f"[PAD{id}]") for id in range(size)]
    about["token_types"] = [kinds.CONTROL if id in special else kinds.USER_DEFINED if id in user
                            else kinds.NORMAL if id in text else kinds.UNUSED for id in range(size)]
    if len({*about["token_list"]}) < size:
        raise ValueError("two tokens of the vocabulary are written alike, which llama.cpp refuses")
    return about | ends(tokenizer, notes), notes


def pre_tokenizer(tokenizer: ByteBPE, notes: list[str]) -> str:
    """llama.cpp's name for the tokenizer's split pattern.

    "glm4" has Llama 3's too, and expects no token that begins a text.
    """
    if tokenizer._pattern == GPT2_PATTERN:
        return "gpt-2"
    if tokenizer._pattern not in (LLAMA3_PATTERN, GPT4_PATTERN):
        raise ValueError("llama.cpp has a fixed list of split patterns, and not this vocabulary's: "
                         f"{tokenizer._pattern[:60]}...")
    notes.append("after an apostrophe llama.cpp takes only ASCII letters for English endings: ſ is "
                 "no s there")
    return "glm4" if tokenizer.bos_id is None else "llama-bpe"


def ends(tokenizer, notes: list[str]) -> dict:
    """The tokens that begin and end texts and turns, and the chat template."""
    about = {"add_bos_token": tokenizer.prefix_ids == (tokenizer.bos_id,)}
    about |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.end_id}
    turn = [id for name in ("<|eot_id|>", "<|user|>")
            if (id := tokenizer.special_ids.get(name)) in tokenizer.turn_ids and id is not None]
    if tokenizer.chat_format == "world":
        turn = tokenizer.encode("\n\n")
    if tokenizer.chat_format == "template":
        turn = [tokenizer.special_ids[tokenizer.template.end]]
    about["eot_token_id"] = turn[0] if turn else None
    about["chat_template"] = tokenizer.template and tokenizer.template.source
    if tokenizer.chat_format and not about["chat_template"]:
        notes.append(f"the run has no chat template: its format {tokenizer.chat_format} must be "
                     "written by hand there")
    if len(tokenizer.prefix_ids) > 1:
        notes.append(f"texts begin with {tokenizer.decode(tokenizer.prefix_ids)} here, there only "
                     "conversations do")
    if tokenizer.added.nfc:
        notes.append("text is normalised (NFC) here, not there")
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"]
           for token in tokenizer.added.tokens.values() if not token["special"]):
        notes.append("added tokens with conditions are found without them there")
    return {name: value for name, value in about.items() if value is not None}

# ------------------------------------------------------------------------------------------ a file


def exported(model, gguf, architecture: str, kind: str):
    """Yields (name, tensor, its type) as they are in the file: all but matrices is fp32 there."""
    number = next(id for id, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, len(model.state_dict()))
    for ours, tensor in tensors(model):
        theirs = ours                        # of tensors that only llama.cpp has
        if not ours.startswith(("blk.", "rope_freqs.")):
            theirs = names.get_name(ours, (".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"the package gguf has no name for {ours} of {architecture}")
        matrix = tensor.dim() == 2 and ours.endswith(".weight") and "wpe" not in ours
        yield (theirs if theirs.endswith((".weight", ".bias")) else f"{theirs}.weight", tensor,
               gguf.GGMLQuantizationType[kind.upper() if matrix else "F32"])


def write(model, tokenizer, path: Path, kind: str | None = None, name: str = "") -> list[str]:
    """Write a GGUF file; returns lines that say what is in it. kind: of TYPES, of the matrices;
    None: as the model has them."""
    try:
        import gguf
    except ImportError:
        raise ImportError("a GGUF file needs the package: pip install gguf") from None
    config, dtype = model.config, next(model.parameters()).dtype
    kind = kind or next(short for short, known in TYPES.items() if known == dtype)
    architecture, settings = describe(model)
    check_vocabulary(config, tokenizer)
    about, notes = vocabulary(tokenizer, config.vocab_size, gguf.TokenType)
    stated = {"pad_token_id": config.pad_token_id,
              "eos_token_id": min(eos_tokens(config), default=None)}
    about = {key: value for key, value in stated.items() if value is not None} | about
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, architecture)
    of_all = "ALL" if kind == "f32" else "MOSTLY"
    for key, value in {"file_type": gguf.LlamaFileType[f"{of_all}_{kind.upper()}"],
                       "name": name or path.stem, "vocab_size": config.vocab_size, **settings,
                       **about}.items():
        getattr(writer, f"add_{key}")(value)
    try:                                     # the tensors twice, so that copies do not add up
        for theirs, tensor, stored in exported(model, gguf, architecture, kind):
            writer.add_tensor_info(theirs, tensor.shape, np.dtype("float32"), tensor.numel() * (
                4 if stored.name == "F32" else 2), stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, stored in exported(model, gguf, architecture, kind):
            data = tensor.to(TYPES[stored.name.lower()]).contiguous().view(torch.uint8)
            writer.write_tensor_data(data.numpy())
        writer.close()
        os.replace(part, path)
    finally:
        writer.close()
        part.unlink(missing_ok=True)
    template = "with its chat template" if "chat_template" in about else "no chat template"
    split = about.get("tokenizer_pre", "World")
    return [f"model      {architecture}, matrices in {kind}: {path}, {gb(path.stat().st_size)}",
            f"tokenizer  {about['tokenizer_model']}, split as {split}, {config.vocab_size:,} tokens; "
            f"{template}",
            *(f"differs    {note}" for note in notes)]

# ----------------------------------------------------------------------------------- command line


def parse(argv: list[str] | None):
    parser = Parser(prog="practice.gguf", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("weights", metavar="RUN", help="a run, a checkpoint or an adapter")
    parser.add_argument("out", metavar="OUT.gguf", type=Path, help="a new file")
    parser.add_argument("--type", choices=TYPES, help="of the matrices (without this flag: as they "
                        "are stored); llama.cpp's llama-quantize has smaller ones")
    parser.add_argument("--tokenizer", metavar="PATH", help="if it is not beside the weights")
    parser.add_argument("--base", metavar="DIR", help="where an adapter's base is, if not where "
                        "its config says")
    parser.set_defaults(chat=None, system=None)
    return parser.parse_args(argv)


def convert(args) -> None:
    """Load what the command line names, write it, and say what to do with it."""
    if args.out.suffix != ".gguf" or args.out.exists() or not args.out.parent.is_dir():
        raise ValueError(f"{args.out}: " + ("exists: choose another name" if args.out.exists() else
                         "name a new file that ends in .gguf, in a folder that exists"))
    place = Place(args)
    if place.classifier:
        raise ValueError(place.classifier)
    tokenizer, _, _ = place.load_tokenizer(args)
    model = (load_merged(place.adapter, place.weights, torch.device("cpu"), None) if place.adapter
             else load_checkpoint(place.weights, "cpu"))
    name = Path(args.weights).resolve().stem
    print("\n".join(write(model, tokenizer, args.out, args.type, name)))
    print(f"""use it     llama-cli -m {args.out}
           echo 'FROM {args.out.resolve()}' > Modelfile; ollama create {name} -f Modelfile""")


def main(argv: list[str] | None = None) -> None:
    """`python -m practice.gguf`: a user's mistake is one line and exit status 2."""
    args = parse(argv)
    show_any_text()
    try:
        convert(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(complain(f"practice.gguf: {error}"))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(complain("practice.gguf: out of memory"))


if __name__ == "__main__":
    main()
