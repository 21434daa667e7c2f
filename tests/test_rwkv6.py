"""rwkv6.py against the official code, and against itself: one recurrence, computed in three ways."""
import json
import math
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, continuation, published, run
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import rwkv6
from rwkv6 import RWKV6, SIZES, RWKV6Config, State, wkv6, wkv6_loop
from train import load_checkpoint


@pytest.fixture(scope="module")
def expected(golden):
    return published(golden / "rwkv6")


@pytest.fixture(scope="module")
def model(golden):
    return RWKV6.from_pretrained(golden / "rwkv6")


def small(noise=0.1, **changes):
    """A small model whose every parameter matters: at the start of training many are zero."""
    torch.manual_seed(0)
    model = RWKV6(replace(RWKV6Config.sized(2, 32, 61, 40), head_size=8, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
        model.emb.weight.normal_()
    return model


def golden_loss(model, expected, penalty=0.0):
    """Cross entropy as the set has it, and the L2Wrap, which whoever trains adds."""
    logits = model(expected["tokens"])
    loss = F.cross_entropy(logits.flatten(0, 1), expected["targets"].flatten())
    return loss + 0.5 * penalty * logits.amax(-1).square().mean()


# --- goldens ---

def test_logits_and_loss_equal_the_official_code(model, expected):
    assert_close(model(expected["tokens"]), expected["logits"], 1e-5, "logits")
    assert_close(golden_loss(model, expected), expected["loss"], 1e-6, "loss")


def test_gradients_equal_the_official_code_in_size_and_direction(golden, expected):
    model = RWKV6.from_pretrained(golden / "rwkv6")
    golden_loss(model, expected).backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad.double().flatten()
        size = expected[f"grad.{name}"].item()
        assert grad.norm().item() == pytest.approx(size, rel=2e-4, abs=1e-9), name
        along = (grad * torch.cos(torch.arange(1.0, len(grad) + 1, dtype=torch.float64))).sum().item()
        assert along == pytest.approx(expected[f"graddot.{name}"].item(), abs=2e-4 * size), name


def test_gradients_with_the_l2wrap_equal_the_official_code(golden, expected):
    model = RWKV6.from_pretrained(golden / "rwkv6")
    golden_loss(model, expected, RWKV6.L2WRAP).backward()
    told_apart = 0                           # the penalty is small: it shows where it can
    for name, parameter in model.named_parameters():
        size, plain = expected[f"grad_l2wrap.{name}"].item(), expected[f"grad.{name}"].item()
        assert parameter.grad.double().norm().item() == pytest.approx(size, rel=1e-4, abs=1e-9), name
        told_apart += abs(size - plain) > 2e-4 * plain
    assert told_apart > 5


@pytest.mark.parametrize("pieces", [[24], [1] * 24, [5, 1, 11, 7]])
def test_the_state_after_each_layer_equals_the_official_rnn(model, expected, pieces):
    state = model.new_state(2)
    with torch.no_grad():
        for piece in expected["tokens"].split(pieces, dim=1):
            model.hidden(piece, state)
    for i in range(2):
        assert_close(state.att_x[:, i], expected[f"state.{i}.att_xx"], 1e-5, f"layer {i} att_x")
        assert_close(state.wkv[:, i], expected[f"state.{i}.att_kv"], 1e-4, f"layer {i} wkv")
        assert_close(state.ffn_x[:, i], expected[f"state.{i}.ffn_xx"], 1e-5, f"layer {i} ffn_x")
    assert state.position.tolist() == [24, 24]


def test_greedy_ids_equal_the_official_rnn(model, expected):
    assert model.generate(expected["tokens"].tolist(), 16, temperature=0) == expected["greedy"].tolist()


def wrong_norm(model):
    for block in model.blocks:
        block.att.ln_x.eps = 1e-5


def wrong_order(model):                      # of what the LoRA adds to: r, k, v, w, g
    for block in model.blocks:
        block.att.time_maa_w2.data = block.att.time_maa_w2.data[[3, 1, 2, 0, 4]]


def wrong_layer_norm(model):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6


def no_bonus(model):
    for block in model.blocks:
        block.att.time_faaaa.data.zero_()


@pytest.mark.parametrize("mistake", [wrong_norm, wrong_order, wrong_layer_norm, no_bonus])
def test_the_goldens_would_show_a_mistake(golden, expected, mistake):
    model = RWKV6.from_pretrained(golden / "rwkv6")
    mistake(model)
    with pytest.raises(AssertionError, match="logits"):
        assert_close(model(expected["tokens"]), expected["logits"], 1e-3, "logits")


def test_trained_weights_give_the_published_logits_and_text(assets):
    model = RWKV6.from_pretrained(assets / "real/rwkv6")
    expected = published(assets / "real/rwkv6")
    with torch.no_grad():
        assert_close(model(expected["tokens"]), expected["prompt_logits"], 2e-6, "prompt")
        assert_close(model(expected["text_tokens"]), expected["text_logits"], 2e-6, "text")
        last = model(expected["tokens"])[:, -1]     # theirs: before the weights were quantised
        assert_close(last, expected["last_logits"], 6e-3, "last")
    greedy = model.generate(expected["tokens"].tolist(), 48, temperature=0)
    assert greedy == expected["greedy"].tolist()


# --- the operator ---

def operands(T, lowest=-8.0, highest=3.0, B=2, H=2, D=6):
    """r, k, v, w, u, S0 in fp64; log-decays w from -exp(lowest) to -exp(highest) per step."""
    generator = torch.Generator().manual_seed(T)
    r, k, v = torch.randn(3, B, H, T, D, generator=generator, dtype=torch.float64)
    w = -torch.exp(lowest + (highest - lowest) * torch.rand(r.shape, generator=generator).double())
    u = torch.randn(H, D, generator=generator, dtype=torch.float64)
    return r, k, v, w, u, torch.randn(B, H, D, D, generator=generator, dtype=torch.float64)


lengths = pytest.mark.parametrize("T", [1, 2, 3, 7, 16, 63, 64, 65, 128, 200])


@lengths
def test_chunks_equal_the_recurrence_in_values_and_gradients(T):
    """In fp64 nothing is left to rounding; any length, any decay, a state to begin with."""
    ours = [x.clone().requires_grad_() for x in operands(T)]
    theirs = [x.clone().requires_grad_() for x in operands(T)]
    (y, S), (y2, S2) = wkv6(*ours), wkv6_loop(*theirs)
    assert_close(y, y2, 1e-13, "y")
    assert_close(S, S2, 1e-13, "S")
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    for out, state in ((y, S), (y2, S2)):
        ((out * weight).sum() + state.square().sum()).backward()
    for name, a, b in zip(("r", "k", "v", "w", "u", "S0"), ours, theirs):
        assert_close(a.grad, b.grad, 1e-12, f"gradient of {name}")


@lengths
def test_chunks_are_exact_in_fp32_for_any_decay(T):
    """Decays from exp(-0.0003) to exp(-400) a step, mixed: no overflow, and no digits lost."""
    exact = operands(T, -8.0, 6.0)
    (y, S), (y2, S2) = wkv6(*(x.float() for x in exact)), wkv6_loop(*exact)
    assert y.dtype == S.dtype == torch.float32
    assert_close(y, y2, 1e-6, "y")
    assert_close(S, S2, 1e-6, "S")


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks_from_a_state_equal_the_loop_in_values_and_gradients(monkeypatch, chunk):
    """A state that matters enters a sequence of several chunks, and its gradient comes back."""
    monkeypatch.setattr(rwkv6, "CHUNK", chunk)
    ours, theirs = ([x.requires_grad_() for x in operands(150, -8.0, -3.0)] for _ in range(2))
    (y, S), (y2, S2) = wkv6(*ours), wkv6_loop(*theirs)
    assert_close(y, y2, 1e-13, "y")
    assert_close(S, S2, 1e-13, "S")
    assert (wkv6(*ours[:5], torch.zeros_like(S))[0] - y).abs().max() > 0.01 * y.abs().max()
    (y.tanh().sum() + S.tanh().sum()).backward()
    (y2.tanh().sum() + S2.tanh().sum()).backward()
    for name, a, b in zip(("r", "k", "v", "w", "u", "S0"), ours, theirs):
        assert b.grad.abs().max() > 0, name
        assert_close(a.grad, b.grad, 1e-12, f"gradient of {name}")


def test_constant_extreme_decays_have_finite_gradients():
    for rate in (0.0, 1e-30, 1e-4, 13.5, 100.0, 1e4, 1e30):
        r, k, v, w, u, S = (x.float() for x in operands(130))
        inputs = [x.requires_grad_() for x in (r, k, v, torch.full_like(w, -rate), u, S)]
        y, end = wkv6(*inputs)
        assert_close(y, wkv6_loop(*(x.detach().double() for x in inputs))[0], 2e-6, f"decay {rate}")
        (y.sum() + end.sum()).backward()
        assert all(x.grad.isfinite().all() for x in inputs), rate


def test_two_pieces_equal_one_sequence_also_in_gradients():
    r, k, v, w, u, S = (x.requires_grad_() for x in operands(150))
    whole, end = wkv6(r, k, v, w, u, S)
    want = torch.autograd.grad(whole.square().sum() + end.sum(), (r, w, S))
    first, middle = wkv6(*(x[:, :, :70] for x in (r, k, v, w)), u, S)
    second, last = wkv6(*(x[:, :, 70:] for x in (r, k, v, w)), u, middle)
    assert_close(torch.cat([first, second], 2), whole, 1e-13, "y")
    got = torch.autograd.grad(first.square().sum() + second.square().sum() + last.sum(), (r, w, S))
    for a, b in zip(got, want):
        assert_close(a, b, 1e-12, "gradient")


def test_the_operator_computes_in_fp32_under_autocast_and_in_bf16():
    r, k, v, w, u, S = (x.float() for x in operands(100))
    want, _ = wkv6(r, k, v, w, u, S)
    with torch.autocast("cpu", torch.bfloat16):
        y, end = wkv6(r, k, v, w, u, S)
    assert torch.equal(y, want)
    half = [x.bfloat16() for x in (r, k, v)]
    y, end = wkv6(*half, w, u, S)
    assert y.dtype == end.dtype == torch.float32
    assert torch.equal(y, wkv6(*(x.float() for x in half), w, u, S)[0])


def test_the_operator_runs_without_data():
    """On the meta device, where train.py counts operations."""
    y, S = wkv6(*(x.float().to("meta") for x in operands(100)))
    assert (y.shape, S.shape) == ((2, 2, 100, 6), (2, 2, 6, 6))


# --- the model: parallel, in pieces, token by token ---

def test_parallel_equals_recurrent_and_any_pieces(monkeypatch):
    model, tokens = small(), torch.randint(61, (3, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens)
        for pieces in ([1] * 150, [5, 1, 11, 133], [64, 64, 22], [149, 1]):
            state = model.new_state(3)
            got = torch.cat([model(piece, state) for piece in tokens.split(pieces, dim=1)], 1)
            assert_close(got, whole, 1e-5, f"{pieces[:4]}")
        monkeypatch.setattr(rwkv6, "CHUNK", 8)
        assert_close(model(tokens), whole, 1e-5, "chunks of 8")


def test_gradients_of_the_model_equal_those_of_the_loop(monkeypatch):
    model, tokens = small().double(), torch.randint(61, (2, 70), generator=torch.Generator().manual_seed(0))
    grads = []
    for operator in (wkv6, wkv6_loop):
        monkeypatch.setattr(rwkv6, "wkv6", operator)
        model.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        assert_close(grad, grads[1][name], 1e-6, name)      # w is made in fp32 even here


def test_a_batch_of_different_lengths_equals_its_rows():
    model = small()
    prompts = [[3, 1, 4, 1, 5] * 20, [5], [9, 2, 6, 5, 3, 5, 8], [9, 7], [4, 4]]
    together = model.generate(prompts, 12, temperature=0)
    assert together == [model.generate([prompt], 12, temperature=0)[0] for prompt in prompts]
    assert together == [continuation(model, prompt, 12) for prompt in prompts]
    assert len({tuple(row) for row in together}) > 2


def test_going_on_from_a_saved_state_equals_one_long_prompt(tmp_path):
    model, ids = small(), []
    state = model.new_state(1)
    for turn in ([3, 1, 4], [1, 5, 9, 2], [6]):
        ids += turn
        [new] = model.generate([ids[int(state.position):]], 6, state=state, temperature=0)
        assert new == continuation(model, ids, 6)
        ids += new
        save_file(state._asdict(), tmp_path / "state")
        state = State(**load_file(tmp_path / "state"))


def test_a_state_is_fp32_without_limit_and_of_the_same_size_after_any_number_of_ids():
    model = small().bfloat16()
    state = model.new_state(2, 5)
    assert state.capacity == math.inf and model.config.context is None
    before = {name: (tensor.shape, tensor.data_ptr()) for name, tensor in state._asdict().items()}
    model.hidden(torch.zeros(2, 300, dtype=torch.int64), state)
    assert before == {name: (tensor.shape, tensor.data_ptr()) for name, tensor in state._asdict().items()}
    assert [t.dtype for t in state] == [torch.int64] + [torch.float32] * 3
    copy, view = State(*map(torch.clone, state)), state._make(t[1:2] for t in state)
    view.wkv.add_(1)
    view.position.add_(5)
    assert state.position.tolist() == [300, 305] and copy.position.tolist() == [300, 300]
    assert torch.equal(state.wkv[1], copy.wkv[1] + 1) and torch.equal(state.wkv[0], copy.wkv[0])
    with pytest.raises(ValueError, match="3 rows"):
        model(torch.zeros(3, 4, dtype=torch.int64), state)


def test_a_world_1b6_state_is_a_few_megabytes_at_most():
    with torch.device("meta"):
        state = RWKV6(SIZES["1.6b"]).new_state(1)
    assert sum(t.numel() * t.element_size() for t in state) == 12_976_136


def test_gradients_with_a_state_are_those_of_the_piece_alone():
    """The past is data, read as it was, however often the state is written before backward."""
    model, tokens = small(), torch.arange(60).view(2, 30)
    state = model.new_state(2)
    model.hidden(tokens[:, :10], state)
    assert not any(tensor.requires_grad for tensor in state)
    copy = State(*map(torch.clone, state))
    both = model(tokens[:, 10:20], state).square().sum() + model(tokens[:, 20:], state).square().sum()
    both.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(tokens[:, 10:20], copy).square().sum().backward()
    model(tokens[:, 20:], copy).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(got[name], parameter.grad, 1e-5, name)
    with torch.no_grad():
        assert_close(copy.wkv, state.wkv, 1e-6, "state")


def test_a_tuned_state_is_where_every_sequence_begins():
    plain, tuned = small(), small(tuned_state=True)
    for name, parameter in plain.named_parameters():
        tuned.get_parameter(name).data.copy_(parameter.data)
    tokens = torch.arange(20)[None]
    state = plain.new_state(1)
    for i, block in enumerate(tuned.blocks):                    # files hold it value by key
        state.wkv[0, i] = block.att.time_state.detach().transpose(1, 2)
    with torch.no_grad():
        want = plain(tokens, state)
        assert not torch.allclose(want, plain(tokens))
        assert_close(tuned(tokens), want, 1e-6, "stateless")
        assert_close(tuned(tokens, tuned.new_state(1)), want, 1e-6, "with a state")
    tuned(tokens).square().sum().backward()
    assert all(block.att.time_state.grad.abs().sum() > 0 for block in tuned.blocks)


def test_a_tuned_state_as_published_loads_merged_into_its_model_and_not_alone(tmp_path):
    """A .pth of the time_state of each layer, (H, D, D), in bf16; rwkv_state_merger.py of ChatRWKV merges so."""
    model = small()
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 8, 8).bfloat16() for i in range(2)}
    torch.save(states, tmp_path / "state.pth")
    torch.save({**model.state_dict(), **states}, tmp_path / "merged.pth")
    merged, tokens, state = load_checkpoint(tmp_path / "merged.pth"), torch.arange(20)[None], model.new_state(1)
    assert merged.config == replace(model.config, tuned_state=True)
    for i in range(2):
        state.wkv[0, i] = states[f"blocks.{i}.att.time_state"].float().transpose(1, 2)
    with torch.no_grad():
        assert_close(merged(tokens), model(tokens, state), 1e-6)
    with pytest.raises(ValueError, match="state.pth is a tuned state without its model") as caught:
        load_checkpoint(tmp_path / "state.pth")
    assert "\n" not in str(caught.value)


def test_compiled_equals_eager_in_one_graph():
    model, tokens = small(), torch.arange(40).view(2, 20)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(fast(tokens), model(tokens), 1e-6, "a sequence")
    fast(tokens).square().sum().backward()
    states = model.new_state(2), model.new_state(2)
    with torch.no_grad():
        for step in tokens.split(1, dim=1)[:4]:
            assert_close(fast(step, states[0]), model(step, states[1]), 1e-6, "a token")
    assert_close(states[0].wkv, states[1].wkv, 1e-6, "the state")
    torch.compiler.reset()


def watched(monkeypatch):
    """What the model hands to wkv6 from now on."""
    seen = []

    def operator(*inputs):
        seen.append(inputs)
        return wkv6(*inputs)
    monkeypatch.setattr(rwkv6, "wkv6", operator)
    return seen


def test_the_decay_is_computed_in_fp32_from_bf16_weights(monkeypatch):
    """A decay of 0.999 is 1 in bf16: nothing would ever be forgotten."""
    model, seen = small().bfloat16(), watched(monkeypatch)
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_decay.copy_(torch.linspace(-8, -5, 32))
            block.att.time_decay_w2.zero_()
        model(torch.arange(20)[None])
    for block, (r, _, _, w, _, S) in zip(model.blocks, seen):
        assert w.dtype == torch.float32 and S.dtype == torch.float32 and r.dtype == torch.bfloat16
        exact = -torch.exp(block.att.time_decay.float()).view(4, 1, 8).expand(4, 20, 8)
        assert torch.equal(w[0], exact) and (w.exp() < 1).all()
        assert (w.bfloat16().float() != w).any()


def test_time_mixing_hands_its_operator_what_the_equations_say(monkeypatch):
    """From the docstring, channel by channel: the five blends, the decay, the heads."""
    model, seen = small(), watched(monkeypatch)
    att, x = model.blocks[1].att, torch.randn(2, 7, 32)
    with torch.no_grad():
        got = att(x, None, None)
        before = torch.cat([torch.zeros(2, 1, 32), x[:, :-1]], 1)
        low = torch.tanh((x + att.time_maa_x * (before - x)) @ att.time_maa_w1).split(att.time_maa_w2.shape[1], -1)
        mixed = {name: x + (getattr(att, f"time_maa_{name}") + low[i] @ att.time_maa_w2[i]) * (before - x)
                 for i, name in enumerate("wkvrg")}
        w = -torch.exp(att.time_decay + torch.tanh(mixed["w"] @ att.time_decay_w1) @ att.time_decay_w2)
        want = (att.receptance(mixed["r"]), att.key(mixed["k"]), att.value(mixed["v"]), w)
        y, _ = wkv6_loop(*(z.view(2, 7, 4, 8).transpose(1, 2) for z in want), att.time_faaaa, torch.zeros(2, 4, 8, 8))
        y = y.transpose(1, 2)                # (B, T, H, D)
        y = (y - y.mean(-1, True)) / (y.var(-1, unbiased=False, keepdim=True) + 64e-5).sqrt()
        y = y.flatten(2) * att.ln_x.weight + att.ln_x.bias
        assert_close(got, att.output(y * F.silu(att.gate(mixed["g"]))), 1e-5, "time mixing")
        ffn = model.blocks[1].ffn
        k = F.relu(ffn.key(x + ffn.time_maa_k * (before - x))) ** 2
        gate = torch.sigmoid(ffn.receptance(x + ffn.time_maa_r * (before - x)))
        assert_close(ffn(x, None), gate * ffn.value(k), 1e-6, "channel mixing")
    for name, a, b in zip("rkvw", seen[0], want):
        assert_close(a, b.view(2, 7, 4, 8).transpose(1, 2), 1e-5, name)


def test_every_norm_has_the_eps_of_the_authors():
    model = small()
    eps = {name: module.eps for name, module in model.named_modules() if hasattr(module, "eps")}
    assert eps == {"blocks.0.ln0": 1e-5, "ln_out": 1e-5, **{
        f"blocks.{i}.{name}": 64e-5 if name == "att.ln_x" else 1e-5
        for i in range(2) for name in ("ln1", "ln2", "att.ln_x")}}
    assert small(group_norm_eps=0.5).blocks[1].att.ln_x.eps == 0.5
    x = torch.randn(2, 3, 32)
    for norm in (model.blocks[0].ln0, model.blocks[1].ln1, model.blocks[1].ln2, model.ln_out):
        wide = (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        assert_close(norm(x), wide * norm.weight + norm.bias, 1e-6, "LayerNorm")


@pytest.mark.parametrize("T", [70, 150])
def test_gradients_with_a_state_over_several_chunks_equal_the_loop(monkeypatch, T):
    """The state is read as it was, and what is left in it is the loop's."""
    model, tokens = small().double(), torch.randint(61, (2, 10 + T), generator=torch.Generator().manual_seed(0))
    first, got = model.new_state(2), []
    with torch.no_grad():
        model.hidden(tokens[:, :10], first)
    for operator in (wkv6, wkv6_loop):
        monkeypatch.setattr(rwkv6, "wkv6", operator)
        state = State(*map(torch.clone, first))
        model.zero_grad()
        logits = model(tokens[:, 10:], state)
        logits.square().sum().backward()
        got.append((logits, *state, *(p.grad.clone() for p in model.parameters())))
    for i, (ours, loops) in enumerate(zip(*got)):
        assert_close(ours, loops, 1e-5, f"tensor {i}")                  # the state is kept in fp32
    assert not torch.equal(first.wkv, state.wkv)


def test_the_token_before_comes_from_the_state_and_the_last_is_left_there():
    x, last = torch.arange(24.0).view(2, 3, 4), torch.full((2, 4), 7.0)
    shifted = rwkv6.previous(x, None)
    assert torch.equal(shifted[:, 1:], x[:, :-1]) and not shifted[:, 0].any()
    y = x.bfloat16().requires_grad_()
    shifted = rwkv6.previous(y, last)
    assert shifted.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert torch.equal(shifted[:, 1:], y[:, :-1]) and (shifted[:, 0] == 7).all()
    assert torch.equal(last, x[:, -1]) and not last.requires_grad
    shifted.sum().backward()
    assert torch.equal(y.grad[:, :, 0], torch.tensor([[1, 1, 0]] * 2).bfloat16())


def test_bf16_and_autocast_stay_close_to_fp32(model, expected):
    def distance(logits):
        p, q = expected["logits"].log_softmax(-1), logits.float().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean().item()
    half = RWKV6(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert distance(half(expected["tokens"])) < 2e-3
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(model(expected["tokens"])) < 2e-3
    with torch.autocast("cpu", torch.bfloat16):
        golden_loss(half.float(), expected).backward()


# --- sizes and initialisation ---

@pytest.mark.parametrize("name, count", [("1.6b", 1_599_873_024), ("3b", 3_099_863_040),
                                         ("7b", 7_635_746_816), ("14b", 14_069_088_256)])
def test_published_sizes_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in RWKV6(SIZES[name]).parameters()) == count


def test_the_sizes_state_what_the_published_files_have():
    told = {name: (c.vocab_size, c.n_embd, c.n_layer, c.head_size, c.dim_ffn, c.mix_lora, c.decay_lora)
            for name, c in SIZES.items()}
    assert told == {"1.6b": (65536, 2048, 24, 64, 7168, 32, 64), "3b": (65536, 2560, 32, 64, 8960, 32, 64),
                    "7b": (65536, 4096, 32, 64, 14336, 64, 128), "14b": (65536, 4096, 61, 64, 14336, 64, 128)}
    for c in SIZES.values():
        assert (c.eos_token_id, c.bos_token_id, c.pad_token_id, c.tuned_state) == (0, None, None, False)
        assert c.group_norm_eps == 64e-5 and c.context is None
    assert replace(RWKV6Config(), eos_token_id=0) == SIZES["1.6b"]


@pytest.mark.parametrize("width, head, wide, mix, decay", [
    (1, 1, 32, 1, 1), (2, 2, 32, 1, 1), (8, 8, 32, 4, 4), (32, 32, 96, 16, 16), (67, 1, 224, 32, 33),
    (96, 48, 320, 32, 48), (128, 64, 448, 32, 64), (2560, 64, 8960, 32, 64), (4096, 64, 14336, 64, 128)])
def test_sized_has_the_proportions_of_the_authors(width, head, wide, mix, decay):
    assert RWKV6Config.sized(3, width, 99, 50) == RWKV6Config(99, width, 3, head, wide, mix, decay)


@pytest.mark.parametrize("width", [8, 32, 67, 96, 100, 128, 384, 768, 4096])
def test_sized_never_fails_for_reasonable_widths(width):
    config = RWKV6Config.sized(1, width, 61, 40)
    with torch.device("meta"):
        RWKV6(config)
    assert config.head_size <= 64 and width % config.head_size == 0
    assert config.mix_lora < width and config.decay_lora < width
    if width == 4096:
        assert replace(config, vocab_size=65536, n_layer=32, eos_token_id=0) == SIZES["7b"]


def test_initial_values_are_those_of_the_authors():
    torch.manual_seed(0)
    L, C, V = 4, 128, 512
    model = RWKV6(RWKV6Config.sized(L, C, V, 256))
    value = dict(model.named_parameters())
    assert value["emb.weight"].abs().max() <= 1e-4 < 1.01 * value["emb.weight"].abs().max()
    head = value["head.weight"]                                  # orthogonal columns of length 0.5 sqrt(V/C)
    assert_close(head.T @ head, 0.25 * V / C * torch.eye(C), 1e-5, "head")
    for i in range(L):
        deep, left = i / (L - 1), 1 - i / L
        for h in (0, 1, 50, C - 1):                              # the formulas, one channel at a time
            mix, wave = (h / C) ** left, 0.1 * ((h + 1) % 3 - 1)
            for name, want in (
                    ("att.time_maa_x", 1 - mix), ("att.time_maa_w", 1 - mix), ("att.time_maa_k", 1 - mix),
                    ("att.time_maa_v", 1 - (mix + 0.3 * deep)), ("att.time_maa_r", 1 - math.sqrt(mix)),
                    ("att.time_maa_g", 1 - math.sqrt(mix)),
                    ("att.time_decay", -6 + 5 * (h / (C - 1)) ** (0.7 + 1.3 * deep)),
                    ("att.time_faaaa", deep * (1 - h / (C - 1)) + wave),
                    ("att.ln_x.weight", ((1 + i) / L) ** 0.7), ("att.ln_x.bias", 0.0),
                    ("ffn.time_maa_k", 1 - (h / C) ** left ** 3),
                    ("ffn.time_maa_r", 1 - (h / C) ** left ** 3), ("ln1.weight", 1.0), ("ln2.bias", 0.0)):
                got = value[f"blocks.{i}.{name}"].flatten()[h].item()
                assert got == pytest.approx(want, abs=1e-5), f"{name} of layer {i}, channel {h}"
        for name in ("att.time_maa_w1", "att.time_decay_w1", "att.output.weight", "ffn.value.weight",
                     "ffn.receptance.weight"):
            assert not value[f"blocks.{i}.{name}"].any(), name
        for name in ("att.time_maa_w2", "att.time_decay_w2"):
            assert 0.0095 < value[f"blocks.{i}.{name}"].abs().max() <= 0.01, name
        for name, gain in (("att.key", 0.1), ("att.gate", 0.1), ("att.receptance", 1.0), ("att.value", 1.0),
                           ("ffn.key", 1.0)):
            matrix = value[f"blocks.{i}.{name}.weight"]
            assert_close(matrix.T @ matrix, gain**2 * torch.eye(C), 1e-4, name)


def test_one_layer_and_tiny_widths_start_finite():
    for layers, width in ((1, 8), (1, 1), (2, 2)):
        model = RWKV6(RWKV6Config.sized(layers, width, 11, 8))
        assert all(p.isfinite().all() for p in model.parameters())
        assert model(torch.arange(6)[None]).isfinite().all()


def test_parameter_groups_are_the_authors_and_complete():
    model = small(tuned_state=True)
    groups = model.parameter_groups(0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"] == 0.3)
             for group in groups for p in group["params"]}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    hidden = {names[id(p)] for group in groups if group["hidden_matrix"] for p in group["params"]}
    assert hidden == {f"blocks.{i}.{name}.weight" for i in range(2) for name in (
        "att.receptance", "att.key", "att.value", "att.gate", "att.output", "ffn.key", "ffn.receptance",
        "ffn.value")}
    assert sum(len(group["params"]) for group in groups) == len(names) == len(found)
    for name, group in found.items():                            # RWKV-LM src/model.py, first match wins
        shape = [n for n in model.get_parameter(name).shape if n != 1]
        want = ((1.0, False) if "_w1" in name or "_w2" in name else (1.0, True) if "time_sta" in name else
                (1.0, False) if "time_maa" in name else (2.0, False) if "time_decay" in name else
                (1.0, True) if len(shape) >= 2 and ".weight" in name else (1.0, False))
        assert group == want, name
    assert (RWKV6.OPTIMIZER, RWKV6.L2WRAP) == ({"betas": (0.9, 0.99), "eps": 1e-8}, 1e-4)


def test_a_few_steps_of_training_lower_the_loss():
    torch.manual_seed(0)
    model = RWKV6(RWKV6Config.sized(2, 32, 61, 40))
    tokens = torch.arange(80).view(2, 40) % 7
    groups = [{**g, "lr": 3e-3 * g["lr_scale"]} for g in model.parameter_groups(0.1)]
    optimizer, losses = torch.optim.AdamW(groups, **RWKV6.OPTIMIZER), []
    for _ in range(40):
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(61), abs=0.3) and losses[-1] < 0.5


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("n_layer", -1), ("head_size", 5), ("dim_ffn", 0), ("mix_lora", 0),
    ("decay_lora", 0), ("group_norm_eps", -1.0), ("group_norm_eps", 1.0), ("n_embd", 0), ("head_size", 0)])
def test_an_impossible_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        replace(RWKV6Config.sized(2, 32, 61, 40), **{field: value})


# --- reading and writing ---

def test_save_then_load_gives_the_same_bits_and_config(tmp_path):
    for changes in ({}, dict(tuned_state=True, group_norm_eps=1e-5, bos_token_id=0, eos_token_id=[0, 3], pad_token_id=1)):
        model = small(**changes)
        model.save_pretrained(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.pth"]
        for path in (tmp_path, tmp_path / "model.pth"):
            again = RWKV6.from_pretrained(path)
            assert again.config == model.config and not again.training
            tokens = torch.arange(20)[None]
            assert torch.equal(model(tokens), again(tokens))
    model.bfloat16().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in RWKV6.from_pretrained(tmp_path).state_dict().values()} == {torch.bfloat16}
    assert RWKV6.from_pretrained(tmp_path, dtype=torch.float32).emb.weight.dtype == torch.float32


def test_files_in_fp16_in_bf16_and_of_two_dtypes_load_and_stay_close_to_fp32(tmp_path):
    """The third, of mixed-precision trainers, is in the dtype of its matrices then."""
    model, path, tokens = small(), tmp_path / "model.pth", torch.arange(60).view(2, 30)
    stored = model.state_dict()

    def inner(name):
        return name.startswith("blocks.") and name.endswith(".weight") and stored[name].dim() == 2
    with torch.no_grad():
        p = model(tokens).log_softmax(-1)
    for dtype, two in ((torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        torch.save({name: t if two and not inner(name) else t.to(dtype) for name, t in stored.items()}, path)
        for again in (RWKV6.from_pretrained(path), load_checkpoint(path)):
            assert {t.dtype for t in again.state_dict().values()} == {dtype}
        assert [len(new) for new in again.generate([[3, 1, 4], [1]], 5, stop=())] == [5, 5]
        with torch.no_grad():
            q = again(tokens).float().log_softmax(-1)
        assert (p.exp() * (p - q)).sum(-1).mean() < 1e-2, (dtype, two)
        whole = RWKV6.from_pretrained(path, dtype=torch.float32).state_dict()
        assert all(torch.equal(whole[name], stored[name]) for name in stored if two and not inner(name))


def test_the_file_is_the_official_one_name_by_name(golden, tmp_path):
    RWKV6.from_pretrained(golden / "rwkv6").save_pretrained(tmp_path)
    theirs = torch.load(golden / "rwkv6/weights.pth", weights_only=True)
    ours = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(ours) and set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)        # shapes too


def test_squeezed_and_prefixed_files_load_to_the_same_logits(model, expected, golden, tmp_path):
    stored = torch.load(golden / "rwkv6/weights.pth", weights_only=True)
    for kind, changed in (
            ("prefix", {f"_forward_module.{name}": t for name, t in stored.items()}),
            ("squeezed", {name: t.squeeze() for name, t in stored.items()}),
            ("axes added", {name: t[..., None] if "faaaa" in name else t for name, t in stored.items()})):
        torch.save(changed, tmp_path / "model.pth")
        again = RWKV6.from_pretrained(tmp_path / "model.pth")
        assert again.config == model.config
        assert torch.equal(again(expected["tokens"]), model(expected["tokens"])), kind


def test_saved_models_open_in_the_rwkv_package_to_the_same_logits_and_state(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    monkeypatch.delenv("RWKV_V7_ON", raising=False)
    package = pytest.importorskip("rwkv.model")
    for tuned in (False, True):
        torch.manual_seed(0)
        model = small(tuned_state=tuned)
        model.save_pretrained(tmp_path)
        theirs = package.RWKV(os.fspath(tmp_path / "model"), "cpu fp32", verbose=False)
        ids = torch.randint(61, (90,)).tolist()
        logits, memory = theirs.forward(ids, None, full_output=True)
        state = model.new_state(1)
        with torch.no_grad():
            assert_close(model(torch.tensor([ids]), state)[0], logits, 1e-5, "logits")
        for i in range(2):
            assert_close(state.wkv[0, i], memory[3 * i + 1], 1e-5, "state")


def test_overrides_change_the_config_and_unknown_ones_are_refused(golden):
    path = golden / "rwkv6/weights.pth"
    assert RWKV6.from_pretrained(path, group_norm_eps=1e-5).config.group_norm_eps == 1e-5
    assert RWKV6.from_pretrained(path, eos_token_id=0).config.eos_token_id == 0
    with pytest.raises(ValueError, match="n_heads"):
        load_checkpoint(path, n_heads=3)
    with pytest.raises(ValueError, match="does not fit"):
        load_checkpoint(path, n_layer=3)
    for field, value in (("n_embd", "8"), ("dim_ffn", 1.5), ("decay_lora", "x")):
        with pytest.raises(ValueError, match=field):
            load_checkpoint(path, **{field: value})
    with pytest.raises(ValueError):
        load_checkpoint(path, decay_lora=None)


def test_config_json_tells_what_shapes_do_not_and_shapes_win(model, golden, tmp_path):
    """Also one from before config.json named every size, and one with fields that are not ours."""
    shutil.copy(golden / "rwkv6/weights.pth", tmp_path / "model.pth")
    for stated in (dict(group_norm_eps=1e-3, bos_token_id=None, eos_token_id=[0, 3], pad_token_id=1),
                   dict(group_norm_eps=1e-3, eos_token_id=[0, 3], pad_token_id=1, n_layer=7,
                        head_size=1, tuned_state=True, ctx_len=1024, model_type="rwkv6")):
        (tmp_path / "config.json").write_text(json.dumps(stated))
        assert RWKV6.from_pretrained(tmp_path).config == replace(
            model.config, group_norm_eps=1e-3, eos_token_id=[0, 3], pad_token_id=1)


def test_several_models_in_a_folder_are_an_error_that_names_them(golden, tmp_path):
    for name in ("rwkv-10.pth", "rwkv-2.pth"):
        shutil.copy(golden / "rwkv6/weights.pth", tmp_path / name)
    for load in (RWKV6.from_pretrained, load_checkpoint):
        with pytest.raises(ValueError, match=r"rwkv-10\.pth.*rwkv-2\.pth"):
            load(tmp_path)
    assert load_checkpoint(tmp_path / "rwkv-2.pth").config.n_layer
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        RWKV6.from_pretrained(tmp_path / "empty")


def test_a_file_from_before_zip_archives_loads(golden, tmp_path):
    stored = torch.load(golden / "rwkv6/weights.pth", weights_only=True)
    torch.save(stored, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_checkpoint(tmp_path / "old.pth").emb.weight, stored["emb.weight"])


@pytest.mark.parametrize("names, words", [
    (["blocks.0.att.x_r", "blocks.0.att.k_k"], "RWKV-7"),
    (["blocks.0.att.time_maa_x", "blocks.0.att.time_maa_rkvw_w1"], "x060b or x060c"),
    (["blocks.0.att.time_maa_x", "blocks.0.att.gate_w1"], "x060a"),
    (["blocks.0.ffnPre.key.weight", "blocks.1.att.time_maa_x"], "ffnPre"),
    (["head_q.weight", "blocks.0.att.time_mix_k"], "headQK"),
    (["blocks.0.tiny_q.weight", "blocks.1.att.time_maa_x"], "tiny_"),
    (["pos_emb_x", "blocks.1.att.time_mix_k", "blocks.0.pos_emb_x"], "pos_emb"),
    (["rwkv.blocks.0.attention.time_maa_x"], "Hugging Face"),
    (["blocks.0.att.ln_x.weight", "blocks.0.att.time_mix_k"], "RWKV-5"),
    (["blocks.0.att.time_mix_k", "blocks.0.att.time_decay"], "RWKV-4"),
    (["blocks.0.att.time_mix"], "RWKV-2"), (["transformer.wte.weight"], "no RWKV.*wte")])
def test_other_models_are_refused_by_what_they_are(tmp_path, names, words):
    torch.save({name: torch.zeros(4) for name in names}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=words) as caught:
        load_checkpoint(tmp_path / "model.pth")
    assert "\n" not in str(caught.value)


def test_no_other_model_loads_silently(golden, tmp_path):
    """Without load_checkpoint there is no name for it, but an error all the same."""
    for name in ("rwkv2", "rwkv3", "rwkv4", "rwkv5"):
        with pytest.raises((KeyError, RuntimeError)):
            RWKV6.from_pretrained(golden / name)
    stored = torch.load(golden / "rwkv6/weights.pth", weights_only=True)
    for name in ("blocks.0.att.time_maa_rkvw_w1", "blocks.0.att.gate_w1", "head_q.weight",
                 "blocks.0.tiny_q.weight", "blocks.0.ffnPre.key.weight", "blocks.0.pos_emb_x"):
        torch.save({**stored, name: torch.zeros(4)}, tmp_path / "model.pth")
        with pytest.raises(RuntimeError, match=name):
            RWKV6.from_pretrained(tmp_path / "model.pth")


def damaged(golden, folder, kind):
    """A copy of the golden with one fault."""
    folder.mkdir()
    weights, config = folder / "model.pth", folder / "config.json"
    shutil.copy(golden / "rwkv6/weights.pth", weights)
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
        config.write_text('{"model_type": "gpt2"}')
    elif kind == "bad eps":
        config.write_text('{"group_norm_eps": "small"}')
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
            stored = {name: t for name, t in stored.items() if not name.startswith("blocks.0.")}
        elif kind == "other width":
            stored["blocks.1.ffn.value.weight"] = torch.zeros(96, 300)
        elif kind == "heads":
            stored["blocks.0.att.time_faaaa"] = torch.zeros(3, 31)
        elif kind == "vector":
            stored["blocks.0.att.time_maa_w1"] = torch.zeros(96)
        torch.save(stored, weights)
    return folder


@pytest.mark.parametrize("kind", [
    "truncated", "pointer", "empty", "no weights", "config is a list", "other model", "bad eps", "a list",
    "not a tensor", "no embedding", "no matrix", "one more", "no layer 0", "other width", "heads", "vector"])
def test_a_damaged_checkpoint_is_one_clear_line(golden, tmp_path, kind):
    with pytest.raises((ValueError, OSError)) as caught:
        load_checkpoint(damaged(golden, tmp_path / "copy", kind))
    assert "\n" not in str(caught.value) and 20 < len(str(caught.value)) < 600


def test_random_damage_to_a_file_raises_nothing_else(golden, tmp_path):
    rng, intact = random.Random(0), (golden / "rwkv6/weights.pth").read_bytes()
    for _ in range(20):
        data = bytearray(intact)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), rng.choice((50, 2000, 10**9))))] = rng.randrange(256)
        (tmp_path / "model.pth").write_bytes(bytes(data[:rng.choice((len(data), rng.randrange(len(data))))]))
        try:
            load_checkpoint(tmp_path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)


# --- the file alone ---

def test_the_file_alone_builds_trains_saves_loads_and_generates(root, tmp_path):
    shutil.copy(root / "rwkv6.py", tmp_path)
    (tmp_path / "use.py").write_text("""
import torch, rwkv6
model = rwkv6.RWKV6(rwkv6.RWKV6Config.sized(1, 16, 20, 12))
tokens = torch.arange(12)[None] % 20
loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
loss.backward()
model.save_pretrained("saved")
print(len(rwkv6.RWKV6.from_pretrained("saved").generate([[1, 2]], 5, seed=0)[0]))
""")
    done = run("use.py", cwd=tmp_path)
    assert done.stdout == "5\n", done.stderr
