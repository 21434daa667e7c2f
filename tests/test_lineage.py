"""lineage/: each RWKV against the official code of its time, and against itself."""
import json
import math
import os
import random
import shutil
import types
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, continuation, published, run
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lineage import rwkv2, rwkv3, rwkv4, rwkv5
from lineage.rwkv2 import wkv2, wkv2_loop
from lineage.rwkv3 import wkv3, wkv3_loop
from lineage.rwkv4 import wkv4, wkv4_loop
from lineage.rwkv5 import wkv5, wkv5_loop
from train import NextTokenLoss, load_checkpoint

# a model of each kind: its file, and the config fields that make it
KINDS = {"rwkv2": (rwkv2, {}), "rwkv2 headQK": (rwkv2, dict(head_qk=6, ctx_len=20)),
         "rwkv3": (rwkv3, {}), "rwkv3 headQK": (rwkv3, dict(head_qk=6, ctx_len=20)),
         "rwkv4": (rwkv4, {}), "rwkv5.0": (rwkv5, dict(version="5.0", head_size=8)),
         "rwkv5.1": (rwkv5, dict(version="5.1", head_size=8)), "rwkv5.2": (rwkv5, dict(head_size=8))}
SETS = ("rwkv2", "rwkv2_pile", "rwkv3", "rwkv3_pile", "rwkv4", "rwkv5")     # of goldens
FILES = {"rwkv2": rwkv2, "rwkv3": rwkv3, "rwkv4": rwkv4, "rwkv5": rwkv5}
kinds, sets, files = (pytest.mark.parametrize(name, values) for name, values in (
    ("kind", KINDS), ("name", SETS), ("file", FILES)))


def parts(file):
    """What train.py takes from the file of a model, by the names it has there."""
    name = file.__name__.split(".")[-1].upper()
    return types.SimpleNamespace(Model=getattr(file, name), Config=getattr(file, name + "Config"),
                                 SIZES=file.SIZES, State=file.State, name=name.lower())


def small(kind, noise=0.1, **changes):
    """A small model whose every parameter matters: at the start of training many are zero."""
    file, fields = KINDS[kind]
    torch.manual_seed(0)
    its = parts(file)
    model = its.Model(replace(its.Config.sized(2, 32, 61, 40), **{**fields, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
        model.emb.weight.normal_()
    return model


def load(golden, name, **overrides):
    return parts(FILES[name[:5]]).Model.from_pretrained(golden / name, **overrides)


def golden_loss(model, expected, penalty=0.0):
    """Cross entropy as the set has it, and the L2Wrap, which whoever trains adds."""
    logits = model(expected["tokens"])
    loss = F.cross_entropy(logits.flatten(0, 1), expected["targets"].flatten())
    return loss + 0.5 * penalty * logits.amax(-1).square().mean()


# --- goldens ---

@sets
def test_logits_and_loss_equal_the_official_code(golden, name):
    model, expected = load(golden, name), published(golden / name)
    assert_close(model(expected["tokens"]), expected["logits"], 5e-6, "logits")
    assert_close(golden_loss(model, expected), expected["loss"], 1e-6, "loss")


@sets
def test_gradients_equal_the_official_code_in_size_and_direction(golden, name):
    model, expected = load(golden, name), published(golden / name)
    golden_loss(model, expected).backward()
    for key, parameter in model.named_parameters():
        grad = parameter.grad.double().flatten()
        size = expected[f"grad.{key}"].item()
        assert grad.norm().item() == pytest.approx(size, rel=2e-5, abs=1e-9), key
        along = (grad * torch.cos(torch.arange(1.0, len(grad) + 1, dtype=torch.float64))).sum().item()
        assert along == pytest.approx(expected[f"graddot.{key}"].item(), abs=2e-5 * size + 1e-9), key
    assert {key for key in expected if key.startswith("grad.")} == {
        f"grad.{key}" for key, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["rwkv4", "rwkv5"])
def test_gradients_with_the_l2wrap_equal_the_official_code(golden, name):
    model, expected = load(golden, name), published(golden / name)
    golden_loss(model, expected, model.L2WRAP).backward()
    told_apart = 0                           # the penalty is small: it shows where it can
    for key, parameter in model.named_parameters():
        size, plain = expected[f"grad_l2wrap.{key}"].item(), expected[f"grad.{key}"].item()
        assert parameter.grad.double().norm().item() == pytest.approx(size, rel=2e-5, abs=1e-9), key
        told_apart += abs(size - plain) > 1e-4 * plain
    assert told_apart >= 5


@pytest.mark.parametrize("pieces", [[24], [1] * 24, [5, 1, 11, 7]], ids=len)
@sets
def test_the_state_after_each_layer_equals_the_official_rnn(golden, name, pieces):
    model, expected = load(golden, name), published(golden / name)
    state, got = model.new_state(2, 24), []
    with torch.no_grad():
        for piece in expected["tokens"].split(pieces, dim=1):
            got.append(model(piece, state))
    for i in range(model.config.n_layer):
        assert_close(state.att_x[:, i], expected[f"state.{i}.att_xx"], 1e-5, f"layer {i} att_x")
        if name == "rwkv5":
            assert_close(state.wkv[:, i], expected[f"state.{i}.att_kv"], 2e-5, f"layer {i} wkv")
        else:
            for row, what in zip(state.wkv[:, i].unbind(1), ("aa", "bb", "pp")):    # p, q, o
                assert_close(row, expected[f"state.{i}.att_{what}"], 2e-5, f"layer {i} {what}")
        assert_close(state.ffn_x[:, i], expected[f"state.{i}.ffn_xx"], 1e-5, f"layer {i} ffn_x")
    if "state.hk" in expected:
        assert_close(state.head_k, expected["state.hk"], 1e-5, "keys of headQK")
        assert torch.equal(state.ids, expected["tokens"])
    assert_close(torch.cat(got, 1), expected["logits"], 5e-6, "logits")
    assert state.position.tolist() == [24, 24]


@sets
def test_greedy_ids_equal_the_official_rnn(golden, name):
    model, expected = load(golden, name), published(golden / name)
    assert model.generate(expected["tokens"].tolist(), 16, temperature=0) == expected["greedy"].tolist()


def wrong_layer_norm(model):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6


def no_bonus(model):
    for block in model.blocks:
        getattr(block.att, "time_faaaa", getattr(block.att, "time_first", None)).data.zero_()


def wrong_group_norm(model):
    for block in model.blocks:
        block.att.ln_x.eps = 1e-5


def other_eps(model):
    for block in model.blocks:
        block.att.eps = {1e-16: 1e-9, 1e-9: 1e-8, 1e-8: 1e-9}[block.att.eps]


def no_clamp(model):
    for block in model.blocks:
        block.att.clamp = math.inf


def no_copying(model):
    model.head_q.weight.data.zero_()


def softer_copying(model):                   # by the root of the size, as attention has it
    model.head_q.weight.data *= model.config.head_qk**0.5


@pytest.mark.parametrize("name, mistakes", [
    ("rwkv2", [other_eps, no_clamp, no_copying, softer_copying, wrong_layer_norm, no_bonus]),
    ("rwkv2_pile", [other_eps, no_clamp, no_bonus]),
    ("rwkv3", [other_eps, no_clamp, no_copying, softer_copying, wrong_layer_norm, no_bonus]),
    ("rwkv3_pile", [other_eps, no_clamp]), ("rwkv4", [wrong_layer_norm, no_bonus]),
    ("rwkv5", [wrong_group_norm, wrong_layer_norm, no_bonus])])
def test_the_goldens_would_show_a_mistake(golden, name, mistakes):
    expected = published(golden / name)
    for mistake in mistakes:
        model = load(golden, name)
        mistake(model)
        with pytest.raises(AssertionError, match="logits"):
            assert_close(model(expected["tokens"]), expected["logits"], 5e-4, "logits")


@pytest.mark.parametrize("folder, name, eps", [("rwkv4", "rwkv4", None), ("rwkv5_1", "rwkv5", 1e-5),
                                               ("rwkv5_2", "rwkv5", 1e-5)])
def test_trained_weights_give_the_published_logits_and_text(assets, folder, name, eps):
    expected = published(assets / "real" / folder)
    model = parts(FILES[name]).Model.from_pretrained(
        assets / "real" / folder, **({"group_norm_eps": eps} if eps else {}))
    with torch.no_grad():
        assert_close(model(expected["tokens"]), expected["prompt_logits"], 2e-6, "prompt")
        assert_close(model(expected["text_tokens"]), expected["text_logits"], 5e-6, "text")
        assert_close(model(expected["tokens"])[:, -1], expected["last_logits"], 2e-6, "last")
    [greedy] = model.generate(expected["tokens"].tolist(), expected["greedy"].shape[1], temperature=0)
    assert greedy == expected["greedy"][0].tolist()


# --- the operators ---

def operands(operator, T, spread=1.0, highest=3.0, B=2, C=7, H=2, D=6):
    """Arguments in fp64: k of this spread, log-decays w from -exp(-8) to -exp(highest) per step."""
    generator = torch.Generator().manual_seed(T)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    if operator is wkv5:
        w = -torch.exp(-8 + (highest + 8) * torch.rand(H, D, generator=generator).double())
        return *normal(3, B, H, T, D), w, normal(H, D), normal(B, H, D, D)
    k, v = normal(2, B, T, C)
    w = -torch.exp(-8 + (highest + 8) * torch.rand(C, generator=generator).double())
    S = normal(B, 3 if operator is wkv4 else 2, C)
    S[:, 1] = S[:, 1].abs() + 0.1            # a sum of weights
    return k * spread, v, w, normal(C), S


def invariant(S):
    """Of p, q, o, which only together mean something: the mean and the log of the weights."""
    return S if S.shape[1] != 3 or S.dim() == 4 else torch.stack([S[:, 0] / S[:, 1], S[:, 2] + S[:, 1].log()])


def with_eps(operator, eps=1e-8):
    """The same function with eps given: only those of RWKV-2 and 3 take one."""
    return operator if operator in (wkv4, wkv5, wkv4_loop, wkv5_loop) else \
        lambda *arguments: operator(*arguments, eps)


OPERATORS = pytest.mark.parametrize("operator, loop", [(wkv2, wkv2_loop), (wkv3, wkv3_loop), (wkv4, wkv4_loop),
                                                       (wkv5, wkv5_loop)])


@pytest.mark.parametrize("T", [1, 2, 3, 7, 16, 63, 64, 65, 130])
@OPERATORS
def test_parallel_equals_the_recurrence_in_values_and_gradients(operator, loop, T):
    """In fp64 nothing is left to rounding; any length, any decay, a state to begin with."""
    ours = [x.clone().requires_grad_() for x in operands(operator, T)]
    theirs = [x.clone().requires_grad_() for x in operands(operator, T)]
    (y, S), (y2, S2) = with_eps(operator)(*ours), with_eps(loop)(*theirs)
    assert_close(y, y2, 1e-13, "y")
    assert_close(S, S2, 1e-13, "S")
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    for out, state in ((y, S), (y2, S2)):
        ((out * weight).sum() + invariant(state).square().sum()).backward()
    for i, (a, b) in enumerate(zip(ours, theirs)):
        rows = slice(2 if operator is wkv4 and i == 4 else None)        # to autograd o is a constant
        assert_close(a.grad[:, rows], b.grad[:, rows], 1e-11, f"gradient of argument {i}") if a.dim() > 1 \
            else assert_close(a.grad, b.grad, 1e-11, f"gradient of argument {i}")


@pytest.mark.parametrize("T", [3, 64, 200])
@OPERATORS
def test_parallel_is_exact_in_fp32_for_any_decay(operator, loop, T):
    """Decays from exp(-0.0003) to exp(-90) a step; k of wkv4 in the hundreds, of the others below 60."""
    exact = list(operands(operator, T, 100.0 if operator is wkv4 else 9.0, 4.5))
    if operator in (wkv2, wkv3):
        exact[0] = exact[0].clamp(max=60)
    exact = [x.float().double() for x in exact]
    (y, S), (y2, S2) = with_eps(operator)(*(x.float() for x in exact)), with_eps(loop)(*exact)
    assert y.dtype == S.dtype == torch.float32
    assert_close(y, y2, 3e-5 if operator is wkv4 else 2e-6, "y")    # k of 300 has an ulp of 3e-5
    assert_close(invariant(S), invariant(S2), 3e-5 if operator is wkv4 else 2e-6, "S")


@OPERATORS
def test_extreme_operands_give_finite_values_and_gradients(operator, loop):
    for rate in (0.0, 1e-30, 1e-4, 13.5, 1e4, 1e30):
        inputs = [x.float() for x in operands(operator, 130, 20.0)]
        if operator in (wkv2, wkv3):
            inputs[0] = inputs[0].clamp(max=60)
        if operator is wkv4:
            inputs[0][:, ::7], inputs[0][:, 3::7], inputs[4] = 1e3, -1e3, torch.zeros_like(inputs[4])
            inputs[4][:, 2] = -1e38          # nothing before
        inputs[-3] = torch.full_like(inputs[-3], -rate)
        inputs = [x.requires_grad_() for x in inputs]
        y, end = with_eps(operator)(*inputs)
        want, _ = with_eps(loop)(*(x.detach().double() for x in inputs))
        assert_close(y, want, 2e-4 if operator is wkv4 else 2e-6, f"decay {rate}")
        (y.sum() + end[..., :2, :].sum()).backward()
        assert all(x.grad.isfinite().all() for x in inputs), rate


@OPERATORS
def test_two_pieces_equal_one_sequence_also_in_gradients(operator, loop):
    arguments = [x.requires_grad_() for x in operands(operator, 150)]
    *sequences, w, u, S = arguments
    time = 2 if operator is wkv5 else 1
    run_it = with_eps(operator)
    whole, end = run_it(*arguments)
    wanted = (sequences[0], w, u)
    want = torch.autograd.grad(whole.square().sum() + invariant(end).sum(), wanted)
    first, middle = run_it(*(x.narrow(time, 0, 70) for x in sequences), w, u, S)
    second, last = run_it(*(x.narrow(time, 70, 80) for x in sequences), w, u, middle)
    assert_close(torch.cat([first, second], time), whole, 1e-13, "y")
    assert_close(last, end, 1e-13, "S")
    got = torch.autograd.grad(first.square().sum() + second.square().sum() + invariant(last).sum(), wanted)
    for a, b in zip(got, want):
        assert_close(a, b, 1e-12, "gradient")


@OPERATORS
def test_the_operator_computes_in_fp32_under_autocast_and_in_bf16(operator, loop):
    *sequences, w, u, S = (x.float() for x in operands(operator, 100))
    want, _ = with_eps(operator)(*sequences, w, u, S)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(with_eps(operator)(*sequences, w, u, S)[0], want)
    half = [x.bfloat16() for x in sequences]
    y, end = with_eps(operator)(*half, w, u, S)
    assert y.dtype == end.dtype == torch.float32
    assert torch.equal(y, with_eps(operator)(*(x.float() for x in half), w, u, S)[0])


def test_one_decay_a_head_is_the_same_decay_in_all_its_channels():
    *sequences, w, u, S = operands(wkv5, 70)
    w, u = w[:, :1], u[:, :1]
    for got, want in zip(wkv5(*sequences, w, u, S),
                         wkv5(*sequences, w.expand(2, 6), u.expand(2, 6), S)):
        assert_close(got, want, 1e-13)


def test_rwkv3_without_its_eps_is_rwkv4():
    old, new = small("rwkv3", k_eps=1e-30), small("rwkv4")
    for name, parameter in new.named_parameters():
        parameter.data.copy_(old.get_parameter(name).data.reshape(parameter.shape))
    tokens = torch.arange(50)[None]
    assert_close(new(tokens), old(tokens), 2e-6)
    for block in old.blocks:
        block.att.eps = 0.01
    assert not torch.allclose(new(tokens), old(tokens), rtol=1e-3)


# --- the models: parallel, in pieces, token by token ---

def some_tokens(*shape):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(0))


@kinds
def test_parallel_equals_recurrent_and_any_pieces(kind, monkeypatch):
    model, tokens = small(kind), some_tokens(3, 80)
    with torch.no_grad():
        whole = model(tokens)
        for pieces in ([1] * 80, [5, 1, 11, 63], [64, 16], [79, 1]):
            state = model.new_state(3, 80)
            got = torch.cat([model(piece, state) for piece in tokens.split(pieces, dim=1)], 1)
            assert_close(got, whole, 1e-5, f"{pieces[:4]}")
        if "5" in kind:
            monkeypatch.setattr(rwkv5, "CHUNK", 8)
            assert_close(model(tokens), whole, 1e-5, "chunks of 8")


@pytest.mark.parametrize("kind, loop", [("rwkv2", wkv2_loop), ("rwkv3 headQK", wkv3_loop), ("rwkv4", wkv4_loop),
                                        ("rwkv5.0", wkv5_loop), ("rwkv5.1", wkv5_loop), ("rwkv5.2", wkv5_loop)])
def test_gradients_of_the_model_equal_those_of_the_recurrence(kind, loop, monkeypatch):
    model, tokens, file = small(kind).double(), some_tokens(2, 37), KINDS[kind][0]
    name, grads = file.__name__.split(".")[-1].replace("r", "", 1), []
    for operator in (getattr(file, name), loop):
        monkeypatch.setattr(file, name, operator)
        model.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        assert_close(grad, grads[1][name], 1e-5, name)      # w is made in fp32 even here


@kinds
def test_a_batch_of_different_lengths_equals_its_rows(kind):
    model = small(kind)
    prompts = [[3, 1, 4, 1, 5] * 8, [5], [9, 2, 6, 5, 3, 5, 8], [9, 7], [4, 4]]
    together = model.generate(prompts, 9, temperature=0)
    assert together == [model.generate([prompt], 9, temperature=0)[0] for prompt in prompts]
    assert together == [continuation(model, prompt, 9) for prompt in prompts]
    assert len({tuple(row) for row in together}) > 2
    stop = together[1][3]                    # a row that has ended never changes, nor do the others
    cut = model.generate(prompts, 9, temperature=0, stop=[stop])
    assert cut == [row[:row.index(stop)] if stop in row else row for row in together]


@kinds
def test_going_on_from_a_saved_state_equals_one_long_prompt(kind, tmp_path):
    model, ids = small(kind), []
    state = model.new_state(1, 60)
    for turn in ([3, 1, 4], [1, 5, 9, 2], [6]):
        ids += turn
        [new] = model.generate([ids[int(state.position):]], 6, state=state, temperature=0)
        assert new == continuation(model, ids, 6)
        ids += new
        save_file(state._asdict(), tmp_path / "state")
        state = type(state)(**load_file(tmp_path / "state"))


@kinds
def test_a_state_is_fp32_without_limit_and_of_the_same_size_after_any_number_of_ids(kind):
    model = small(kind).bfloat16()
    copying = "headQK" in kind
    state = model.new_state(2, 100)
    assert state.capacity == (100 if copying else math.inf) and model.config.context is None
    before = [(tensor.shape, tensor.data_ptr()) for tensor in state]
    model.hidden(torch.zeros(2, 100, dtype=torch.int64), state)
    assert before == [(tensor.shape, tensor.data_ptr()) for tensor in state]
    assert all(len(tensor) == 2 for tensor in state)
    assert {state.att_x.dtype, state.ffn_x.dtype, state.wkv.dtype} == {torch.float32}
    copy, view = type(state)(*map(torch.clone, state)), state._make(tensor[1:2] for tensor in state)
    view.wkv.add_(1)
    view.position.add_(5)
    assert state.position.tolist() == [100, 105] and copy.position.tolist() == [100, 100]
    assert torch.equal(state.wkv[1], copy.wkv[1] + 1) and torch.equal(state.wkv[0], copy.wkv[0])
    with pytest.raises(ValueError, match="3 rows"):
        model(torch.zeros(3, 4, dtype=torch.int64), state)
    if copying:
        with pytest.raises(ValueError, match="104 tokens do not fit.* 100"):
            model.hidden(torch.zeros(2, 4, dtype=torch.int64), copy)
        assert copy.position.tolist() == [100, 100]


@kinds
def test_gradients_with_a_state_are_those_of_the_piece_alone(kind):
    """The past is data, read as it was, however often the state is written before backward."""
    model, tokens = small(kind), torch.arange(60).view(2, 30)
    state = model.new_state(2, 30)
    model.hidden(tokens[:, :10], state)
    assert not any(tensor.requires_grad for tensor in state)
    copy = type(state)(*map(torch.clone, state))
    both = model(tokens[:, 10:20], state).square().sum() + model(tokens[:, 20:], state).square().sum()
    both.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(tokens[:, 10:20], copy).square().sum().backward()
    model(tokens[:, 20:], copy).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert got[name].abs().max() > 0, name
        assert_close(got[name], parameter.grad, 1e-5, name)
    with torch.no_grad():
        assert_close(copy.wkv, state.wkv, 1e-6, "state")


@kinds
def test_gradients_with_an_empty_state_are_those_without(kind):
    model, tokens = small(kind), some_tokens(2, 30)
    model(tokens).square().sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(tokens, model.new_state(2, 30)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, want[name], 1e-5, name)


@pytest.mark.parametrize("kind", ["rwkv3 headQK", "rwkv4", "rwkv5.2"])
def test_compiled_equals_eager_in_one_graph(kind):
    model, tokens = small(kind, n_layer=1), torch.arange(14).view(2, 7)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(fast(tokens), model(tokens), 1e-6, "a sequence")
    states = model.new_state(2, 7), model.new_state(2, 7)
    with torch.no_grad():
        for step in tokens.split(1, dim=1)[:2]:
            assert_close(fast(step, states[0]), model(step, states[1]), 1e-6, "a token")
    assert_close(states[0].wkv, states[1].wkv, 1e-6, "the state")
    torch.compiler.reset()


@sets
def test_bf16_and_autocast_stay_close_to_fp32(golden, name):
    model, expected = load(golden, name), published(golden / name)
    inside = [block.att.key.weight for block in model.blocks]       # the sets have keys of hundreds
    for weight in inside:
        weight.data.clamp_(-1, 1)
    with torch.no_grad():
        reference = model(expected["tokens"])

    def distance(logits):
        p, q = reference.log_softmax(-1), logits.float().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean().item()
    half = type(model)(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert distance(half(expected["tokens"])) < 1e-2
        assert distance(half(expected["tokens"], half.new_state(2, 24))) < 1e-2
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(model(expected["tokens"])) < 1e-2
            assert distance(model(expected["tokens"], model.new_state(2, 24))) < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        golden_loss(model, expected).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- headQK ---

@pytest.mark.parametrize("kind", ["rwkv2 headQK", "rwkv3 headQK"])
def test_headqk_adds_its_fit_to_the_logit_of_every_id_seen(kind):
    """A loop over pairs of positions, on ids of which many repeat, longer than the window of 20."""
    model, tokens = small(kind), some_tokens(1, 30) % 7
    with torch.no_grad():
        hidden = model.hidden(tokens)
        want = model.head(hidden)[0]
        q, k = model.head_q(hidden)[0], model.head_k(hidden)[0]
        for t in range(30):
            for s in range(max(0, t - 19), t + 1):
                want[t, tokens[0, s]] += q[t] @ k[s] / 6
        assert_close(model(tokens)[0], want, 1e-5)
        assert not torch.allclose(want, model.head(hidden)[0], atol=1e-2)


@pytest.mark.parametrize("kind", ["rwkv2 headQK", "rwkv3 headQK"])
def test_headqk_from_hidden_vectors_alone_is_refused(kind):
    model = small(kind)
    with pytest.raises(ValueError, match="call the model itself"):
        model.logits(torch.zeros(1, 3, 32))
    assert model.new_state(1).capacity == model.config.ctx_len
    batch = {"tokens": some_tokens(1, 9), "targets": some_tokens(1, 9)}
    with pytest.raises(ValueError, match="call the model itself"):      # what train.py does
        NextTokenLoss(model)(batch)


@pytest.mark.parametrize("kind", ["rwkv2 headQK", "rwkv3 headQK"])
def test_headqk_of_the_last_position_alone_equals_that_of_all(kind):
    """Also in pieces with a state, in gradients, and where the window of 20 is full."""
    model, tokens = small(kind), some_tokens(2, 30) % 7
    every, last = model(tokens), model(tokens, last=True)
    assert last.shape == (2, 1, 61)
    assert_close(last, every[:, -1:], 1e-6)
    grads = [torch.autograd.grad(logits.square().sum(), [*model.parameters()]) for logits in (every[:, -1:], last)]
    for a, b in zip(*grads):
        assert_close(a, b, 1e-5, "gradient")
    state = model.new_state(2, 30)
    for end, piece in zip((1, 12, 29, 30), tokens.split([1, 11, 17, 1], dim=1)):
        assert_close(model(piece, state, last=True), every[:, end - 1:end].detach(), 1e-5, f"token {end}")


# --- sizes and initialisation ---

COUNTS = {"rwkv2": {"enwik8": 26_944_512, "430m": 430_321_664},
          "rwkv3": {"169m": 169_342_464, "430m": 430_397_440, "1.5b": 1_515_106_304},
          "rwkv4": {"169m": 169_342_464, "430m": 430_397_440, "1.5b": 1_515_106_304, "3b": 2_984_627_200,
                    "7b": 7_392_649_216, "14b": 14_148_597_760, "world-0.1b": 192_780_288,
                    "world-0.4b": 461_647_872, "world-1.5b": 1_577_607_168, "world-3b": 3_062_753_280,
                    "world-7b": 7_517_650_944},
          "rwkv5": {"0.1b": 192_780_576, "0.4b": 461_721_600, "1.5b": 1_577_754_624, "3b": 3_062_999_040,
                    "7b": 7_518_044_160}}


@files
def test_published_sizes_have_the_published_number_of_parameters(file):
    its = parts(FILES[file])
    assert set(its.SIZES) == set(COUNTS[file])
    for name, count in COUNTS[file].items():
        with torch.device("meta"):
            assert sum(p.numel() for p in its.Model(its.SIZES[name]).parameters()) == count, name


@files
def test_sized_never_fails_for_reasonable_widths(file):
    its = parts(FILES[file])
    for width in (8, 32, 67, 96, 100, 128, 384, 768, 4096):
        config = its.Config.sized(1, width, 61, 40)
        with torch.device("meta"):
            model = its.Model(config)
            model(torch.zeros(1, 5, dtype=torch.int64))
        assert config.vocab_size == 61 and config.n_embd == width and config.n_layer == 1
        if width == 4096 and file in ("rwkv4", "rwkv5"):
            published_one = its.SIZES["world-7b" if file == "rwkv4" else "7b"]
            assert replace(config, vocab_size=65536, n_layer=32, eos_token_id=0) == published_one


def initial(kind, i, h, L, C):
    """The authors' values of channel h in layer i, by name, as their files state them."""
    if kind == "rwkv2":
        f1 = 3.0 + (i - 1) / (L - 2) * (1.2 - 3.0) + (0.5 if i == 1 else 0)
        f2 = 0.37 if i == L - 1 else 0.4 if i == L - 2 else 0.65 + (i - 1) / (L - 2) * (0.4 - 0.65)
        mix = 0.0 if h < C // 2 else 1.0
        return {"att.time_decay": math.log(f1 * f2 ** (h / (C - 1) * 7)), "att.time_first": math.log(0.3),
                "att.time_mix": mix, "ffn.time_mix": mix}
    deep, left = i / (L - 1), 1 - i / L
    mix, zigzag = (h / C) ** left, (h + 1) % 3 - 1
    value = {"att.time_mix_k": mix, "att.time_mix_v": mix + 0.3 * deep, "att.time_mix_r": (h / C) ** (0.5 * left),
             "ffn.time_mix_k": mix, "ffn.time_mix_r": mix}
    if kind in ("rwkv3", "rwkv4"):
        return {**value, "att.time_decay": -5 + 8 * (h / (C - 1)) ** (0.7 + 1.3 * deep),
                "att.time_first": math.log(0.3) + 0.5 * zigzag}
    value["att.ln_x.weight"] = ((1 + i) / L) ** 0.7
    if kind == "rwkv5.2":
        return {**value, "att.time_mix_g": value["att.time_mix_r"],
                "att.time_decay": -6 + 5 * (h / (C - 1)) ** (0.7 + 1.3 * deep),
                "att.time_faaaa": deep * (1 - h / (C - 1)) + 0.1 * zigzag}
    return value


def orthogonal(matrix, gain):
    """Whether rows or columns, the fewer, are orthogonal and of this length."""
    matrix = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    assert_close(matrix.T @ matrix, gain**2 * torch.eye(matrix.shape[1]), 1e-4)


@pytest.mark.parametrize("kind", ["rwkv2 headQK", "rwkv3 headQK", "rwkv4", "rwkv5.0", "rwkv5.1", "rwkv5.2"])
def test_initial_values_are_those_of_the_authors(kind):
    torch.manual_seed(0)
    fields, its, L, C, V = KINDS[kind][1], parts(KINDS[kind][0]), 4, 64, 256
    model = its.Model(replace(its.Config.sized(L, C, V, 256), **fields))
    value = {name: p.detach() for name, p in model.named_parameters()}
    orthogonal(value["head.weight"], 0.5 * math.sqrt(V / C))
    modern = "5" in kind
    if modern:
        assert value["emb.weight"].abs().max() <= 1e-4 < 1.01 * value["emb.weight"].abs().max()
    else:
        orthogonal(value["emb.weight"] * 1e4, math.sqrt(V))
    if "headQK" in kind:
        assert not value["head_q.weight"].any()
        orthogonal(value["head_k.weight"], 0.1)
    for i in range(L):
        block = {name.split(".", 2)[2]: p for name, p in value.items() if name.startswith(f"blocks.{i}.")}
        for h in (0, 1, 31, 32, 50, C - 1):                          # the formulas, one channel at a time
            for name, want in initial(kind.split()[0], i, h, L, C).items():
                assert block[name].flatten()[h].item() == pytest.approx(want, abs=1e-5), (name, i, h)
        gains = {"att.key": 0.1, "att.receptance": 1.0, "att.gate": 0.1} if modern else {"ffn.key": 2.0}
        for name in ("att.key", "att.receptance", "att.value", "att.gate", "ffn.key"):
            if f"{name}.weight" in block and (modern or name in ("att.value", "ffn.key")):
                orthogonal(block[f"{name}.weight"], gains.get(name, 1.0))
        for name in ("att.output", "ffn.value", "ffn.receptance") + ((
                "att.key", "att.receptance") if not modern else ()):
            assert not block[f"{name}.weight"].any(), name
    if kind in ("rwkv5.0", "rwkv5.1"):                               # by head, of which there are 8
        for i, block in enumerate(model.blocks):
            want = torch.tensor([-8 + 7 * (h / 7) ** (0.7 + 1.3 * i / 3) for h in range(8)])
            assert_close(block.att.time_decay, want, 1e-5)
            want = [i / 3 * (1 - h / 7) if kind == "rwkv5.1" else -3.0 for h in range(8)]
            assert_close(block.att.time_faaaa if kind == "rwkv5.1" else block.att.time_first, torch.tensor(want), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_few_layers_and_tiny_widths_start_finite(kind):
    file, fields = KINDS[kind]
    its = parts(file)
    for layers, width in ((1, 8), (1, 1), (2, 2), (2, 8)):
        fields = {**fields, "head_size": 1} if "head_size" in fields else fields
        model = its.Model(replace(its.Config.sized(layers, width, 11, 8), **fields))
        assert all(p.isfinite().all() for p in model.parameters())
        assert model(torch.arange(6)[None]).isfinite().all()


@kinds
def test_parameter_groups_are_the_authors_and_complete(kind):
    model = small(kind)
    groups = model.parameter_groups(0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"] == 0.3) for group in groups for p in group["params"]}
    assert {group["weight_decay"] for group in groups} <= {0.0, 0.3}
    assert sum(len(group["params"]) for group in groups) == len(names) == len(found)
    for name, group in found.items():                            # src/model.py, first match wins
        matrix = len([n for n in model.get_parameter(name).shape if n != 1]) >= 2
        want = ((1.0, False) if kind < "rwkv4" or "time_mix" in name else (2.0, False) if "time_decay" in name
                else (1.0, False) if "time_faaaa" in name else (3.0, False) if "time_first" in name
                else (1.0, True) if matrix else (1.0, False))
        assert group == want, name
    old = kind < "rwkv4"
    assert model.OPTIMIZER == {"betas": (0.9, 0.99), "eps": 4e-9 if old else 1e-8}
    assert getattr(model, "L2WRAP", 0.0) == (0.0 if old else 1e-4)


@kinds
def test_a_few_steps_of_training_lower_the_loss(kind):
    torch.manual_seed(0)
    file, fields = KINDS[kind]
    its = parts(file)
    fields = {**fields, "ctx_len": 40} if "headQK" in kind else fields
    model = its.Model(replace(its.Config.sized(2, 32, 61, 40), **fields))
    tokens = torch.arange(80).view(2, 40) % 7
    groups = [{**group, "lr": 6e-3 * group["lr_scale"]} for group in model.parameter_groups(0.1)]
    optimizer, losses = torch.optim.AdamW(groups, **model.OPTIMIZER), []
    for _ in range(30):
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(61), abs=0.3) and losses[-1] < 0.7


@pytest.mark.parametrize("file, field, value", [
    *((file, field, value) for file in FILES for field, value in (
        ("vocab_size", 0), ("n_layer", -1))),
    *((file, field, value) for file in ("rwkv2", "rwkv3") for field, value in (
        ("k_clamp", 100), ("k_eps", 0.0), ("head_qk", -1), ("ctx_len", 0))),
    ("rwkv5", "head_size", 5), ("rwkv5", "group_norm_eps", -1.0), ("rwkv5", "version", "6")])
def test_an_impossible_config_names_the_field(file, field, value):
    with pytest.raises(ValueError, match=field):
        replace(parts(FILES[file]).Config.sized(2, 32, 61, 40), **{field: value})


@pytest.mark.parametrize("file, field, value", [
    *((file, field, value) for file in FILES for field, value in (("n_embd", "8"), ("dim_ffn", 1.5))),
    ("rwkv2", "k_eps", "small"), ("rwkv3", "k_eps", "small"), ("rwkv5", "group_norm_eps", "small")])
def test_a_field_of_a_wrong_type_is_refused_by_name(golden, file, field, value):
    with pytest.raises(ValueError, match=field):
        load_checkpoint(golden / file, **{field: value})


# --- reading and writing ---

@kinds
def test_save_then_load_gives_the_same_bits_and_config(kind, tmp_path):
    extra = {"rwkv2": dict(k_eps=1e-12), "rwkv3": dict(k_clamp=50.0), "rwkv5": dict(group_norm_eps=1e-5)}
    for changes in ({}, dict(bos_token_id=0, eos_token_id=[0, 3], pad_token_id=1, **extra.get(kind[:5], {}))):
        model = small(kind, **changes)
        model.save_pretrained(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.pth"]
        for path in (tmp_path, tmp_path / "model.pth"):
            again = type(model).from_pretrained(path)
            assert again.config == model.config and not again.training
            tokens = torch.arange(20)[None]
            assert torch.equal(model(tokens), again(tokens))
    model.bfloat16().save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    assert stated["torch_dtype"] == "bfloat16" and stated["model_type"] == kind[:5]
    again = type(model).from_pretrained(tmp_path)
    assert {t.dtype for t in again.state_dict().values()} == {torch.bfloat16}
    assert type(model).from_pretrained(tmp_path, dtype=torch.float32).emb.weight.dtype == torch.float32


@kinds
def test_files_in_fp16_in_bf16_and_of_two_dtypes_load_and_stay_close_to_fp32(kind, tmp_path):
    """The third, of mixed-precision trainers, is in the dtype of its matrices then."""
    model, tokens = small(kind), some_tokens(2, 40)
    stored, path = model.state_dict(), tmp_path / "model.pth"

    def inner(key):
        return key.startswith("blocks.") and key.endswith(".weight") and stored[key].dim() == 2
    with torch.no_grad():
        p = model(tokens).log_softmax(-1)
    for dtype, two in ((torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        torch.save({key: t if two and not inner(key) else t.to(dtype) for key, t in stored.items()}, path)
        for again in (type(model).from_pretrained(path), load_checkpoint(path)):
            assert {t.dtype for t in again.state_dict().values()} == {dtype}
        assert [len(new) for new in again.generate([[3, 1, 4], [1]], 5, stop=())] == [5, 5]
        with torch.no_grad():
            q = again(tokens).float().log_softmax(-1)
        assert (p.exp() * (p - q)).sum(-1).mean() < 1e-2, (dtype, two)
        whole = type(model).from_pretrained(path, dtype=torch.float32).state_dict()
        assert all(torch.equal(whole[key], stored[key]) for key in stored if two and not inner(key))


def test_a_tuned_state_of_rwkv5_is_refused_by_name(golden, tmp_path):
    """No official code trains one; that of RWKV-6 loads (tests/test_rwkv6.py)."""
    stored = torch.load(golden / "rwkv5/weights.pth", weights_only=True)
    torch.save({**stored, "blocks.0.att.time_state": torch.zeros(4, 8, 8)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="does not fit its config.*time_state") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind, each", [("rwkv2", 2), ("rwkv3", 2), ("rwkv4", 3), ("rwkv5.0", 8), ("rwkv5.1", 8),
                                        ("rwkv5.2", 8)])
def test_a_layer_remembers_as_many_numbers_as_the_table_says(kind, each):
    """C times 2, 3 or D, which is 8 here, and the last inputs of both halves."""
    state = small(kind).new_state(1)
    assert state.wkv[0, 0].numel() == each * 32
    assert state.att_x[0, 0].numel() == state.ffn_x[0, 0].numel() == 32


@sets
def test_the_file_is_the_official_one_name_by_name(golden, name, tmp_path):
    load(golden, name).save_pretrained(tmp_path)
    theirs = torch.load(golden / name / "weights.pth", weights_only=True)
    ours = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(ours) and set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)           # shapes too


@sets
def test_squeezed_and_prefixed_files_load_to_the_same_logits(golden, name, tmp_path):
    model, expected = load(golden, name), published(golden / name)
    stored = torch.load(golden / name / "weights.pth", weights_only=True)
    for what, changed in (
            ("prefix", {f"_forward_module.{key}": t for key, t in stored.items()}),
            ("squeezed", {key: t.squeeze() if "time_mix" in key or name == "rwkv2" else t
                          for key, t in stored.items()}),
            ("axes added", {key: t[None] if "time_f" in key else t for key, t in stored.items()})):
        torch.save(changed, tmp_path / "model.pth")
        again = type(model).from_pretrained(tmp_path / "model.pth")
        assert again.config == model.config
        assert torch.equal(again(expected["tokens"]), model(expected["tokens"])), what


@pytest.mark.parametrize("kind", ["rwkv4", "rwkv5.0", "rwkv5.1", "rwkv5.2"])
def test_saved_models_open_in_the_rwkv_package_to_the_same_logits_and_state(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    monkeypatch.delenv("RWKV_V7_ON", raising=False)
    package = pytest.importorskip("rwkv.model")
    model = small(kind)
    model.save_pretrained(tmp_path)
    theirs = package.RWKV(os.fspath(tmp_path / "model"), "cpu fp32", verbose=False)
    ids = some_tokens(90).tolist()
    logits, memory = theirs.forward(ids, None, full_output=True)
    state, each = model.new_state(1), 5 if kind == "rwkv4" else 3
    with torch.no_grad():
        assert_close(model(torch.tensor([ids]), state)[0], logits, 1e-5, "logits")
    for i in range(2):
        want = torch.stack(memory[5 * i + 1:5 * i + 4]) if kind == "rwkv4" else memory[each * i + 1]
        assert_close(state.wkv[0, i], want, 1e-5, "state")
        assert_close(state.att_x[0, i], memory[each * i], 1e-5, "state")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rwkv4", "rwkv5.0", "rwkv5.1", "rwkv5.2"])
def test_files_in_fp16_and_bf16_give_the_logits_of_the_official_code(kind, dtype, tmp_path, monkeypatch):
    """In fp32 to rounding where the official code widens the file at once, as RWKV_in_150_lines.py does; the rwkv
    package norms the embedding in the file's dtype before, and differs by that rounding."""
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    monkeypatch.delenv("RWKV_V7_ON", raising=False)
    package = pytest.importorskip("rwkv.model")
    model, ids, half = small(kind), some_tokens(40).tolist(), tmp_path / "half.pth"
    torch.save({name: t.to(dtype) for name, t in model.state_dict().items()}, half)
    with torch.no_grad():
        ours = type(model).from_pretrained(half, dtype=torch.float32)(torch.tensor([ids]))[0]
    torch.save({name: t.to(dtype).float() for name, t in model.state_dict().items()}, tmp_path / "wide.pth")
    for file, tolerance in (("wide", 1e-5), ("half", torch.finfo(dtype).eps)):
        theirs = package.RWKV(os.fspath(tmp_path / file), "cpu fp32", verbose=False)
        assert_close(ours, theirs.forward(ids, None, full_output=True)[0], tolerance, file)


def test_overrides_change_the_config_and_unknown_ones_are_refused(golden):
    assert load(golden, "rwkv2").config.k_eps == 1e-16 and load(golden, "rwkv2_pile").config.k_eps == 1e-9
    assert load(golden, "rwkv2_pile", k_eps=1e-16).config.k_eps == 1e-16
    assert load(golden, "rwkv3", k_clamp=50.0).blocks[0].att.clamp == 50.0
    assert load(golden, "rwkv5", group_norm_eps=1e-5).config.group_norm_eps == 1e-5
    for name in ("rwkv2", "rwkv3", "rwkv4", "rwkv5"):
        assert load(golden, name, eos_token_id=0).config.eos_token_id == 0
        with pytest.raises(ValueError, match="n_heads"):
            load_checkpoint(golden / name, n_heads=3)
        with pytest.raises(ValueError, match="does not fit"):
            load_checkpoint(golden / name, n_layer=4)


VARIANTS = {                                 # what -> (names and shapes, what the refusal says)
    "7": ({"blocks.0.att.x_r": (4,), "blocks.0.att.k_k": (4,)}, "RWKV-7"),
    "x060b": ({"blocks.0.att.time_maa_x": (4,), "blocks.0.att.time_maa_rkvw_w1": (4,)}, "x060b or x060c"),
    "x060a": ({"blocks.0.att.time_maa_x": (4,), "blocks.0.att.gate_w1": (4,)}, "x060a"),
    "ffnPre": ({"blocks.0.ffnPre.key.weight": (4, 4), "blocks.1.att.time_mix_k": (4,)}, "ffnPre"),
    "tiny": ({"blocks.1.tiny_q.weight": (4, 4), "blocks.1.att.time_mix_k": (4,)}, "attention beside"),
    "4a": ({"blocks.1.att.qq.weight": (4, 4), "blocks.1.att.time_mix_k": (4,)}, "attention beside"),
    "images": ({"blocks.0.pos_emb_x": (1, 4, 4), "blocks.0.att.time_mix_k": (4,)}, "pos_emb"),
    "transformers": ({"rwkv.blocks.0.attention.time_mix_key": (1, 1, 4)}, "Hugging Face"),
    "none": ({"transformer.wte.weight": (4, 4)}, "no model of ours.*wte")}


def test_rwkvs_that_are_not_supported_are_refused_by_what_they_are(tmp_path):
    for shapes, words in VARIANTS.values():
        torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.pth")
        with pytest.raises(ValueError, match=words) as caught:
            load_checkpoint(tmp_path / "model.pth")
        assert "\n" not in str(caught.value) and "RWKV-2 to RWKV-6 are supported" in str(caught.value)


@files
def test_no_other_version_loads(file, golden):
    """RWKV-3 and RWKV-4 have the same names: only the shape of time_decay differs."""
    for other in (*SETS, "rwkv6"):
        path = golden / other / "weights.pth"
        assert type(load_checkpoint(path)).__name__.lower() == other[:5]
        if other[:5] != file:
            with pytest.raises((ValueError, KeyError, RuntimeError)):
                parts(FILES[file]).Model.from_pretrained(path)


@pytest.mark.parametrize("file", ["rwkv4", "rwkv5"])
def test_headqk_of_later_models_is_refused(file, golden, tmp_path):
    stored = torch.load(golden / file / "weights.pth", weights_only=True)
    torch.save({**stored, "head_q.weight": torch.zeros(4, 4)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="headQK"):
        load_checkpoint(tmp_path)
    with pytest.raises(RuntimeError, match="head_q.weight"):
        parts(FILES[file]).Model.from_pretrained(tmp_path)


@files
def test_several_files_in_a_folder_are_an_error_that_names_them(file, golden, tmp_path):
    for name in ("rwkv-2.pth", "rwkv-10.pth"):
        shutil.copy(golden / file / "weights.pth", tmp_path / name)
    for read in (parts(FILES[file]).Model.from_pretrained, load_checkpoint):
        with pytest.raises(ValueError, match="rwkv-10.pth.*rwkv-2.pth.*path of one"):
            read(tmp_path)
        assert read(tmp_path / "rwkv-2.pth").config.n_embd == load(golden, file).config.n_embd


def damaged(golden, name, folder, kind):
    """A copy of the golden with one fault."""
    folder.mkdir()
    weights, config = folder / "model.pth", folder / "config.json"
    shutil.copy(golden / name / "weights.pth", weights)
    stored = torch.load(weights, weights_only=True)
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "config is a list":
        config.write_text("[1]")
    elif kind == "other model":
        config.write_text('{"model_type": "rwkv6"}')
    elif kind == "bad number":
        config.write_text('{"group_norm_eps": "small", "k_eps": "small", "eos_token_id": "x"}')
    elif kind == "a list":
        torch.save(list(stored.values()), weights)
    elif kind == "not a tensor":
        torch.save({**stored, "ln_out.bias": 3}, weights)
    else:
        if kind == "no embedding":
            del stored["emb.weight"]
        elif kind == "no matrix":
            del stored["blocks.1.att.key.weight"]
        elif kind == "one more":
            stored["blocks.1.att.surprise"] = torch.zeros(3)
        elif kind == "no layer 0":
            stored = {key: t for key, t in stored.items() if not key.startswith("blocks.0.")}
        elif kind == "other width":
            stored["blocks.1.ffn.value.weight"] = torch.zeros(96, 300)
        elif kind == "decay":
            stored["blocks.0.att.time_decay"] = torch.zeros(0 if name == "rwkv5" else 31)
        elif kind == "mask":
            stored["copy_mask"] = torch.tensor(3.0)
        torch.save(stored, weights)
    return folder


@pytest.mark.parametrize("name", ["rwkv2", "rwkv3", "rwkv4", "rwkv5"])
def test_a_damaged_checkpoint_is_one_clear_line(golden, name, tmp_path):
    for kind in ("truncated", "pointer", "empty", "no weights", "config is a list", "other model", "a list",
                 "not a tensor", "no embedding", "no matrix", "one more", "no layer 0", "other width", "decay",
                 *(["mask"] if name < "rwkv4" else []), *(["bad number"] if name != "rwkv4" else [])):
        with pytest.raises((ValueError, OSError)) as caught:
            load_checkpoint(damaged(golden, name, tmp_path / kind, kind))
        assert "\n" not in str(caught.value) and 20 < len(str(caught.value)) < 600, kind


@files
def test_random_damage_to_a_file_raises_nothing_else(golden, file, tmp_path):
    rng, intact = random.Random(0), (golden / file / "weights.pth").read_bytes()
    for _ in range(8):
        data = bytearray(intact)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), rng.choice((50, 2000, 10**9))))] = rng.randrange(256)
        (tmp_path / "model.pth").write_bytes(bytes(data[:rng.choice((len(data), rng.randrange(len(data))))]))
        try:
            load_checkpoint(tmp_path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)


# --- what lineage/README.md says ---

def test_the_tables_of_the_readme_are_those_of_the_log(root):
    readme = (root / "lineage/README.md").read_text(encoding="utf-8")
    rows = [line for line in (root / "bench/lineage.log").read_text().splitlines()
            if line.startswith(("| wkv", "| gpt", "| rwkv"))]
    for row in rows:
        name, *cells = row.strip("| ").split(" | ")
        if name.startswith("wkv"):
            want = f"| `{name}` | " + " | ".join(cells).replace("**x ", "**× ") + " |"
        else:
            width, count, loss, bits, _ = cells
            want = f"| {name} | {width} | {count} | {float(loss):.3f} | {float(bits):.3f} |"
        assert want in readme, want
    assert len(rows) == 5 + 6


# --- the files alone ---

def test_each_file_alone_builds_trains_saves_loads_and_generates(root, tmp_path):
    for file in FILES:
        shutil.copy(root / "lineage" / f"{file}.py", tmp_path)
    (tmp_path / "use.py").write_text("""
import importlib, torch
for number in (2, 3, 4, 5):
    file = importlib.import_module(f"rwkv{number}")
    Model, Config = getattr(file, f"RWKV{number}"), getattr(file, f"RWKV{number}Config")
    model = Model(Config.sized(1, 16, 20, 12))
    tokens = torch.arange(12)[None] % 20
    loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
    loss.backward()
    model.save_pretrained(f"saved{number}")
    print(len(Model.from_pretrained(f"saved{number}").generate([[1, 2]], 5, seed=0)[0]))
""")
    done = run("use.py", cwd=tmp_path)
    assert done.stdout == "5\n" * 4, done.stderr
