"""practice/fast.py: replaced layers compute what they stand for; speculation is exact."""
import itertools
import json

import pytest
import torch
from helpers import assert_close
from torch import nn
from torch.nn import functional as F
from toy import Toy, ToyConfig

import gpt
import llama3
import rwkv6
from practice import fast
from practice.fast import Lookup, Replacement, Speculation, accelerate, product_in_bf16

SHAPES = ((96, 64), (40, 50), (1, 1), (5, 7), (130, 96), (64, 33))       # (N, K)
CASES = [(weights, name) for weights, kinds in fast.KINDS.items() for name in kinds]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Measurements go to a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    return tmp_path / "cache" / "language-models" / "linears.json"


def small_gpt(seed=0, **changes):
    torch.manual_seed(seed)
    config = gpt.GPTConfig(**{**dict(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2,
                                     n_inner=128), **changes})
    model = gpt.GPT(config).eval()
    with torch.no_grad():                    # untrained weights are too alike to tell errors from
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def small_llama(seed=0):
    torch.manual_seed(seed)
    config = llama3.Llama3Config(vocab_size=50, hidden_size=32, intermediate_size=64, head_dim=8,
                                 num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                 max_position_embeddings=64)
    model = llama3.Llama3(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def kind_or_skip(weights, name, dtype=torch.float32):
    """A kind of layer, if torch has its product for this dtype on this machine."""
    kind = fast.KINDS[weights][name]
    with torch.no_grad():
        try:
            kind(nn.Linear(64, 64).to(dtype))(torch.zeros(1, 64, dtype=dtype))
        except (RuntimeError, AttributeError) as error:
            pytest.skip(f"not on this machine: {error!s:.60}")
    return kind

# ----------------------------------------------------------------------------------- linear layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights, name", CASES)
def test_every_kind_of_layer_computes_x_w_plus_b(weights, name, dtype):
    kind = kind_or_skip(weights, name, dtype)
    for (N, K), bias in itertools.product((*SHAPES, (5000, 70)), (True, False)):
        linear = nn.Linear(K, N, bias=bias).to(dtype)
        layer, b = kind(linear), linear.bias.float() if bias else None
        for inputs in ((1,), (2, 3), (40,), (2, 1), (), (0,)):
            x = torch.randn(*inputs, K).to(dtype)
            with torch.no_grad():
                y, right = layer(x), F.linear(x.float(), layer.rows(0, N), b)
            assert y.dtype == dtype and y.shape == (*inputs, N)
            exact = dtype == torch.float32 and name != "torch's"        # that one has bf16 within
            close = (1e-5 if weights is None else 2e-4) if exact else 0.02      # FBGEMM's int8: inputs of 16 bits
            if y.numel():
                assert_close(y.float(), right, close, f"{weights} {name} {N} x {K}")
        if N > 64:
            assert torch.equal(layer.rows(64, N), layer.rows(0, N)[64:])


def test_layers_that_are_not_quantised_hold_the_same_weights():
    for name, dtype in (("oneDNN's", torch.float32), ("FBGEMM's fp16", torch.float16),
                        ("FBGEMM's fp16", torch.bfloat16)):
        kind = kind_or_skip(None, name, dtype)
        for N, K in SHAPES:
            linear = nn.Linear(K, N).to(dtype)
            assert torch.allclose(kind(linear).rows(0, N), linear.weight.float(), rtol=0, atol=2 ** -24)


@pytest.mark.parametrize("name", fast.KINDS["int8"])
def test_int8_weights_are_as_near_as_eight_bits_allow(name):
    kind = kind_or_skip("int8", name)
    for N, K in SHAPES:
        w = (linear := nn.Linear(K, N)).weight.detach()
        step = w.abs().amax(1, keepdim=True) / 127
        if name == "FBGEMM's":               # two neighbours share 128 steps
            step = torch.maximum(step, F.pad(w, (0, K % 2)).abs().unflatten(1, (-1, 2)).sum(-1).amax(
                1, keepdim=True) / 127)
        assert ((kind(linear).rows(0, N) - w).abs() <= step * 0.51 + 1e-9).all()


@pytest.mark.parametrize("name", fast.KINDS["int4"])
def test_int4_weights_are_as_near_as_four_bits_allow(name):
    kind = kind_or_skip("int4", name)
    for N, K in SHAPES:
        w = (linear := nn.Linear(K, N)).weight.detach()
        error = (kind(linear).rows(0, N) - w).abs()
        for part, difference in zip(w.split(kind.GROUP, 1), error.split(kind.GROUP, 1)):
            zeros = torch.cat([part, torch.zeros(N, 1)], 1) if part.shape[1] < 32 else part
            step = (zeros.amax(1) - zeros.amin(1))[:, None] / 15        # the padding is in the range
            assert (difference <= step * 0.55 + 0.005 * zeros.abs().amax(1, keepdim=True)).all()


def test_weights_become_fp16_only_if_it_holds_them():
    for value, dtype, holds in ((1e-7, torch.bfloat16, True), (7e4, torch.bfloat16, False),
                                (float("nan"), torch.bfloat16, False), (0.1, torch.float32, False),
                                (0.1, torch.float16, True)):
        weight = nn.Linear(64, 32).to(dtype).weight.detach()
        weight[3, 5] = value
        assert fast.Half.holds(weight) == holds
    # small numbers throughout: fp16 would round them
    assert not fast.Half.holds(nn.Linear(64, 32).bfloat16().weight.detach() * 1e-5)


@pytest.mark.parametrize("weights, name", CASES)
def test_zero_and_constant_rows_survive(weights, name):
    kind, linear = kind_or_skip(weights, name), nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        linear.weight[0], linear.weight[1] = 0.0, 0.5
        layer = kind(linear)
        assert_close(layer.rows(0, 2), linear.weight[:2], 0.01, name)
        assert not layer(torch.zeros(2, 64)).any()


def test_int8_products_do_not_overflow_and_keep_small_inputs_beside_large_ones():
    """AVX2 adds pairs of products in 16 bits; eight bits alone would round small inputs to zero."""
    kind, linear = kind_or_skip("int8", "FBGEMM's"), nn.Linear(256, 64)
    with torch.no_grad():
        for weight in (torch.ones(64, 256), torch.randn(64, 256).sign(), torch.randn(64, 256)):
            linear.weight.copy_(weight)
            layer = kind(linear)
            for x in (torch.ones(1, 256), -torch.ones(1, 256), torch.randn(3, 256).sign()):
                right = F.linear(x, layer.rows(0, 64), linear.bias)
                assert (layer(x) - right).abs().max() < 1e-3 * right.abs().max()
            x = torch.randn(1, 256)
            x[0, 7], linear.weight[:, 7] = 1000.0, 0.0
            layer = kind(linear)
            assert_close(layer(x), F.linear(x, layer.rows(0, 64), linear.bias), 0.05, "outlier")


@pytest.mark.parametrize("weights, name", CASES)
def test_nan_and_infinity_in_the_inputs_are_seen_in_the_result(weights, name):
    layer = kind_or_skip(weights, name)(nn.Linear(64, 32))
    for value in (float("nan"), float("inf")):
        x = torch.randn(2, 64)
        x[1, 3] = value
        with torch.no_grad():
            assert not layer(x)[1].isfinite().any()


def test_int8_takes_inputs_at_any_address():
    layer, x = kind_or_skip("int8", "torch's")(nn.Linear(64, 8)), torch.randn(70).bfloat16()
    with torch.no_grad():
        for start in range(6):
            y = layer(x[start:start + 64])
            assert torch.equal(y, layer(x[start:start + 64].clone()))


def test_int4_needs_no_operator_of_torch(monkeypatch):
    linear, x = nn.Linear(70, 130), torch.randn(3, 70)
    kind = fast.KINDS["int4"]["plain"]
    with torch.no_grad():
        right = kind(linear)(x)
        fast.order.cache_clear()
        monkeypatch.setattr(fast, "pack", lambda w: w.to(torch.uint8)[:, ::2] | w.to(
            torch.uint8)[:, 1::2] << 4)
        assert_close(kind(linear)(x), right, 1e-6, "another layout")
    fast.order.cache_clear()


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_accelerated_models_compute_the_same_and_keep_the_embedding(weights):
    for make in (small_gpt, small_llama):
        model, tokens = make(), torch.randint(50, (1, 20))
        table = model.get_submodule("wte" if make is small_gpt else "model.embed_tokens").weight
        before = table.detach().clone()
        with torch.no_grad():
            logits = model(tokens)
            told = accelerate(model, weights)
            assert told.startswith(f"{weights or 'float32'} weights, ")
            assert not any(type(module) is nn.Linear for module in model.modules()) or (
                told.startswith("float32 weights, torch's own products"))
            error = (model(tokens) - logits).norm() / logits.norm()
        assert error < {None: 1e-4, "int8": 0.05, "int4": 0.5}[weights]
        now = model.get_submodule("wte" if make is small_gpt else "model.embed_tokens").weight
        assert now is table and torch.equal(table, before)


def test_a_tied_head_is_replaced_and_its_table_is_not():
    for name, dtype in (("oneDNN's", torch.float32), ("FBGEMM's fp16", torch.bfloat16)):
        model = small_gpt().to(dtype)
        assert model.lm_head.weight is model.wte.weight
        table = model.wte.weight.clone()
        model.lm_head = kind_or_skip(None, name, dtype)(model.lm_head)
        assert model.wte.weight.stride() == (32, 1) and torch.equal(model.wte.weight, table)
        assert torch.equal(model.lm_head.rows(0, 50), table.float())


def test_a_layer_that_fp16_cannot_hold_stays_and_is_counted(monkeypatch):
    monkeypatch.setattr(fast, "choose", lambda *_: ("FBGEMM's fp16", "so"))
    kind_or_skip(None, "FBGEMM's fp16", torch.bfloat16)
    model = small_gpt().bfloat16()
    model.h[1].mlp.c_fc.weight.data[0, 0] = 1e5
    assert accelerate(model).endswith("so; 1 layers stay as they were, fp16 cannot hold them")
    assert type(model.h[1].mlp.c_fc) is nn.Linear and type(model.h[0].mlp.c_fc) is fast.Half


def test_a_recurrent_model_is_accelerated():
    torch.manual_seed(0)
    config = rwkv6.RWKV6Config.sized(2, 64, 50, 32)
    model, tokens = rwkv6.RWKV6(config).eval(), torch.randint(50, (1, 12))
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).weight.normal_(std=0.1)
        logits = model(tokens)
        accelerate(model, "int8")
        assert {name for name, module in model.named_modules()
                if isinstance(module, Replacement)} == {*names}
        assert (model(tokens) - logits).norm() / logits.norm() < 0.05
        one_by_one = model.new_state(1, 12)
        for t in range(12):
            last = model(tokens[:, t:t + 1], one_by_one)
        assert (last - logits[:, -1:]).norm() / logits.norm() < 0.05


@pytest.mark.parametrize("weights, name", CASES)
def test_gradients_reach_the_inputs(weights, name):
    linear = nn.Linear(64, 32)
    layer, x = kind_or_skip(weights, name)(linear), torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    grad, x.grad = x.grad, None
    F.linear(x, layer.rows(0, 32), linear.bias.detach()).square().sum().backward()
    assert_close(grad, x.grad, 0.01 if product_in_bf16() else 1e-5, name)


def test_a_kind_that_fails_or_is_wrong_is_left_out(monkeypatch):
    def missing(self, x):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    for broken in (missing, lambda self, x: self.in_blocks(x) * 2,
                   lambda self, x: self.in_blocks(x) * torch.nan):
        for weights, kinds in fast.KINDS.items():
            for kind in kinds.values():
                monkeypatch.setattr(kind, "product", broken)
            found = fast.measure([nn.Linear(64, 64)], kinds)
            assert {*found} == {"linear"} | ({"plain"} if weights else set())
    model = small_gpt()
    assert "int4 weights, plain products" in accelerate(model, "int4")
    assert type(model.lm_head) is fast.Int4Blocks
    assert "torch's own" in accelerate(small_gpt())


def test_fast_off_and_other_devices_are_plain():
    model = small_gpt()
    assert accelerate(model, fast="off") == "float32 weights, --fast off"
    assert type(model.lm_head) is nn.Linear
    accelerate(model, "int8", fast="off")
    assert type(model.lm_head) is fast.Int8Blocks
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(50, 64, 32, 2, 2, 128))
    assert "this is meta" in accelerate(model)


def test_measuring_happens_once_and_a_broken_cache_is_no_error(cache, monkeypatch):
    calls = []
    monkeypatch.setattr(fast, "measure", lambda *_: calls.append(1) or {"linear": [1.0, 1.0]})
    accelerate(small_gpt())
    accelerate(small_gpt())
    assert len(calls) == 1 and len(json.loads(cache.read_text())) == 1
    [key] = json.loads(cache.read_text())
    older = [json.dumps({key: value}) for value in (3, {"plain": [1.0] * 2}, {
        "linear": [1.0] * 2, "plain": [1.0, "x"]}, {"linear": [1.0] * 3})]
    for damage in ("", "[1]", "3", "{", *older):
        cache.write_text(damage)
        accelerate(small_gpt())
        assert json.loads(cache.read_text())
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))                    # a file, not a folder
    accelerate(small_gpt())
    assert len(calls) == 10


def test_the_quickest_products_are_chosen_and_a_slow_setting_says_so():
    times = {"linear": [3.0, 3.0], "oneDNN's": [1.0, 2.0], "FBGEMM's fp16": [2.0, 1.5]}
    name, why = fast.choose(times, None)
    assert name == "oneDNN's" and "3.00 x the speed of plain" in why and "1.50 x in prompts" in why
    assert "SLOWER" not in why
    name, why = fast.choose({"linear": [1.0, 3.0], "oneDNN's": [0.99, 3.0]}, None)
    assert name == "plain" and "no others are quicker" in why and "SLOWER" not in why
    # quantised weights are compared with the best of the others, which is no choice for them
    name, why = fast.choose({**times, "plain": [9.0, 1.0], "torch's": [2.0, 4.0]}, "int8")
    assert name == "torch's" and "0.50 x the speed of unquantised" in why and "SLOWER" in why
    name, why = fast.choose({**times, "plain": [9.0, 1.0], "torch's": [0.5, 4.0]}, "int4")
    assert name == "torch's" and "2.00 x" in why and "SLOWER" not in why

# ---------------------------------------------------------------------------- speculative decoding

REPETITIVE = [7, 8, 9, 10, 11, 12, 7, 8, 9, 10, 11, 12, 7, 8, 9]


@pytest.mark.parametrize("make, module", [(small_gpt, gpt), (small_llama, llama3)])
@pytest.mark.parametrize("draft", ["lookup", "itself", "another"])
def test_greedy_speculation_gives_the_tokens_of_greedy_decoding(make, module, draft):
    model = make()
    for prompt in ([3], [1, 2, 3, 4, 5], REPETITIVE):
        other = {"lookup": None, "itself": make(), "another": make(1)}[draft]
        speculation = Speculation(module.probabilities, other)
        told, right_told = [], []
        new = speculation.generate(model, [prompt], 45, temperature=0, stop=(), seed=0,
                                   on_token=lambda row, token: told.append((row, token)))
        assert new == model.generate([prompt], 45, temperature=0, stop=(),
                                     on_token=lambda row, token: right_told.append((row, token)))
        assert told == right_told and len(new[0]) == 45
        if draft == "itself":
            assert speculation.accepted == speculation.proposed > 20
            assert "(100%)" in speculation.report()


def test_speculation_stops_and_continues_as_generate_does():
    model, prompt = small_gpt(), REPETITIVE
    [free] = model.generate([prompt], 30, temperature=0, stop=())
    for source in (None, small_gpt()):
        speculation = Speculation(gpt.probabilities, source)
        for stop in ((free[9],), (free[0],), ()):
            told = []
            state, right = model.new_state(1, 64), model.new_state(1, 64)
            for length in (12, 20):          # the second goes on from the first
                seen = int(state.position)
                text = [*prompt, *told]
                [new] = speculation.generate(
                    model, [text[seen:]], length, history=text[:seen], state=state, temperature=0,
                    stop=stop, seed=0, on_token=lambda row, token: told.append(token))
                [expected] = model.generate([text[seen:]], length, state=right, temperature=0,
                                            stop=stop)
                assert new == expected and torch.equal(state.position, right.position)
            filled = int(state.position)
            assert_close(state.key[..., :filled, :], right.key[..., :filled, :], 1e-4, "keys")


def test_a_reply_that_is_interrupted_leaves_the_state_right():
    class Enough(Exception):
        pass

    model, prompt = small_gpt(), REPETITIVE
    [free] = model.generate([prompt], 30, temperature=0, stop=())
    for length in range(1, 14):
        speculation, told, state = Speculation(gpt.probabilities, small_gpt()), [], model.new_state(1, 64)

        def interrupt(row, token):
            told.append(token)
            if len(told) == length:
                raise Enough
        with pytest.raises(Enough):
            speculation.generate(model, [prompt], 30, state=state, temperature=0, stop=(), seed=0,
                                 on_token=interrupt)
        assert int(state.position) == len(prompt) + length - 1 and told == free[:length]
        [rest] = model.generate([told[-1:]], 30 - length, state=state, temperature=0, stop=())
        assert told + rest == free


def test_speculation_fills_context_and_state_to_the_last_token():
    model = small_gpt(n_positions=24)
    for source in (None, small_gpt(n_positions=24), small_gpt(n_positions=18), small_gpt(n_positions=64)):
        [new] = Speculation(gpt.probabilities, source).generate(model, [REPETITIVE], 99, temperature=0,
                                                                stop=(), seed=0)
        assert [new] == model.generate([REPETITIVE], 99, temperature=0, stop=()) and len(new) == 9
    speculation = Speculation(gpt.probabilities)
    state = model.new_state(1, 20)
    [new] = speculation.generate(model, [REPETITIVE], 6, state=state, temperature=0, stop=(), seed=0)
    assert len(new) == 6 and int(state.position) == 20
    assert speculation.generate(model, [REPETITIVE], 0) == [[]]
    with pytest.raises(ValueError, match="21 tokens do not fit"):
        speculation.generate(model, [REPETITIVE], 7, state=model.new_state(1, 20))
    with pytest.raises(ValueError, match="vocabulary has 0 to 49"):
        speculation.generate(model, [[1, 50]], 5)
    with pytest.raises(ValueError, match="temperature -1"):
        speculation.generate(model, [[1, 2]], 5, temperature=-1)
    with pytest.raises(ValueError, match="2 prompts"):
        speculation.generate(model, [[1, 2], [3]], 5)
    with pytest.raises(ValueError, match="the same"):
        Speculation(gpt.probabilities, small_gpt(vocab_size=51)).generate(model, [[1, 2]], 5)


def chi_squared(counts, expected):
    """(statistic, a limit that a right sampler exceeds in one of 10,000 tests), rare cells joined."""
    order = sorted(expected, key=expected.get)
    cells, seen, wanted = [], 0, 0.0
    for cell in order:
        seen, wanted = seen + counts.get(cell, 0), wanted + expected[cell]
        if wanted >= 5:
            cells.append((seen, wanted))
            seen, wanted = 0, 0.0
    cells[-1] = (cells[-1][0] + seen, cells[-1][1] + wanted)
    freedom = len(cells) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    return sum((n - m) ** 2 / m for n, m in cells), limit


def test_accepted_tokens_are_distributed_as_the_model_draws():
    """Two proposals from q: the first two tokens of what is accepted have the distribution p."""
    generator = torch.Generator().manual_seed(1)
    p = torch.tensor([[0.1, 0.2, 0.05, 0.4, 0.25], [0.5, 0.1, 0.0, 0.3, 0.1],
                      [0.2, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64)
    q = torch.tensor([[0.3, 0.0, 0.3, 0.2, 0.2], [0.2, 0.4, 0.2, 0.2, 0.0]], dtype=torch.float64)
    for certain in (False, True):
        draws, counts, firsts = 5000, {}, {}
        for _ in range(draws):
            proposed = [3, 0] if certain else torch.multinomial(
                q, 1, generator=generator)[:, 0].tolist()
            got = fast.accept(proposed, None if certain else q, lambda i: p[i], generator)
            firsts[got[0]] = firsts.get(got[0], 0) + 1
            if len(got) > 1:                 # the second, given that the first was accepted
                counts[got[1]] = counts.get(got[1], 0) + 1
        for found, place in ((firsts, 0), (counts, 1)):
            total = sum(found.values())
            assert total > 1500
            expected = {token: total * float(p[place, token]) for token in range(5)}
            statistic, limit = chi_squared(found, expected)
            assert statistic < limit, (certain, place, statistic, limit)
        assert 2 not in counts


@pytest.mark.slow                            # the one before is quick
@pytest.mark.parametrize("draft", [False, True])
def test_sampled_speculation_has_the_distribution_of_sampling(draft):
    model = small_gpt(1, vocab_size=4, n_layer=1)
    prompt, sampling = [0, 1, 3, 0, 1], dict(temperature=2.0, top_k=3, top_p=0.95)
    expected, draws = {}, 600
    with torch.no_grad():                    # of three tokens, from the model's own probabilities
        for tokens in itertools.product(range(4), repeat=3):
            logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1:-1]
            p = gpt.probabilities(logits, **sampling)
            p = p / p.sum(-1, keepdim=True)
            expected[tokens] = draws * float(p[range(3), list(tokens)].prod())
    speculation = Speculation(gpt.probabilities, small_gpt(2, vocab_size=4, n_layer=1) if draft else None)
    speculation.generate(model, [prompt], 8, seed=0)                    # plain steps come first
    counts = {}
    for seed in range(draws):
        [new] = speculation.generate(model, [prompt], 3, stop=(), seed=seed, **sampling)
        counts[tuple(new)] = counts.get(tuple(new), 0) + 1
    assert speculation.proposed > draws and 0.1 < speculation.accepted / speculation.proposed < 0.95
    assert all(expected[tokens] > 0 for tokens in counts)
    statistic, limit = chi_squared(counts, {t: n for t, n in expected.items() if n > 0})
    assert statistic < limit, (statistic, limit)


def test_the_same_seed_draws_the_same_text():
    model = small_gpt()
    for draft in (None, small_gpt(1)):
        first, again = (Speculation(gpt.probabilities, draft).generate(
            model, [REPETITIVE], 30, temperature=0.7, seed=5) for _ in range(2))
        assert first == again


def test_lookup_proposes_what_followed_before():
    lookup, text = Lookup(), [1, 2, 3, 4, 5, 1, 2, 3]
    assert lookup.propose(text, 2, None, None) == ([4, 5], None)
    text += [9, 2, 3]
    assert lookup.propose(text, 9, None, None) == ([9, 2, 3], None)     # the last occurrence
    assert lookup.propose([*text, 6], 9, None, None) == ([], None)
    assert Lookup().propose([4], 3, None, None) == ([], None)


def test_speculation_that_is_slower_turns_itself_off():
    model, speculation = small_gpt(), Speculation(gpt.probabilities, small_gpt(1))
    [new] = speculation.generate(model, [REPETITIVE], 49, temperature=0, stop=())
    assert speculation.stops == 1 and "turned off" in speculation.report()
    assert len(speculation.checked) == Speculation.CHECKED
    assert [new] == model.generate([REPETITIVE], 49, temperature=0, stop=())
    assert Speculation(gpt.probabilities).report() == "speculation: nothing was proposed"


def test_a_recurrent_model_has_no_speculation():
    recurrent, model = Toy(ToyConfig(vocab_size=50)), small_gpt()
    with pytest.raises(ValueError, match="Toy is recurrent"):
        Speculation(gpt.probabilities).generate(recurrent, [[1, 2]], 5)
    with pytest.raises(ValueError, match="Toy is recurrent"):
        Speculation(gpt.probabilities, recurrent)
    with pytest.raises(ValueError, match="RWKV6 is recurrent"):
        Speculation(gpt.probabilities, rwkv6.RWKV6(rwkv6.RWKV6Config.sized(1, 64, 50, 32)))
    with pytest.raises(ValueError, match="logits hold NaN"):
        with torch.no_grad():
            model.ln_f.weight.fill_(float("nan"))
        Speculation(gpt.probabilities).generate(model, [[1, 2]], 5)
