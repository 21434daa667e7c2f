"""The shared blocks, generate and State, on GPT and on a recurrent toy: the two kinds of memory.

The toy has `generate` of each model file in turn, and with `Bounded` a state that ends.
"""
import json
import math
import sys
from typing import NamedTuple

import pytest
import torch
from helpers import assert_close, continuation
from safetensors.torch import load_file, save_file
from toy import State as ToyState
from toy import Toy, ToyConfig

import train
from gpt import GPT, GPTConfig, probabilities, sample


class Bounded(NamedTuple):
    """The toy's state with an end."""
    position: torch.Tensor
    memory: torch.Tensor
    slots: torch.Tensor                      # (B, M): what they hold does not matter

    @property
    def capacity(self):
        return self.slots.shape[1]


class BoundedConfig(ToyConfig):
    context = 40


class BoundedToy(Toy):
    def new_state(self, batch_size, max_tokens):
        return Bounded(*super().new_state(batch_size, max_tokens),
                       torch.zeros(batch_size, min(max_tokens, 40)))

    def hidden(self, tokens, state=None):
        state = self.new_state(*tokens.shape) if state is None else state
        if int(state.position.max()) + tokens.shape[1] > state.capacity:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit: the capacity is {state.capacity}")
        return super().hidden(tokens, state)


def build(kind):
    """kind: gpt; toy, whose generate is gpt's; toy-NAME or bounded-NAME with that of another file."""
    torch.manual_seed(1)
    if kind == "gpt":
        model = GPT(GPTConfig.sized(2, 32, 61, 40))
    else:
        bounded, donor = kind.startswith("bounded"), train.model_parts(kind.partition("-")[2] or "gpt")[0]
        model = (BoundedToy if bounded else Toy)((BoundedConfig if bounded else ToyConfig)(vocab_size=61))
        model.__class__ = type(kind, (type(model),), dict(
            generate=donor.generate, read_prompts=donor.read_prompts))
    with torch.no_grad():                    # larger weights: peaked, varied distributions
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0 if kind == "gpt" else 2.0)
    return model.eval()


both = pytest.mark.parametrize("kind", ["gpt", "toy", *(f"toy-{n}" for n in train.MODELS if n != "gpt")])
bounded = pytest.mark.parametrize("kind", ["gpt", *(f"bounded-{n}" for n in train.MODELS)])
EIGHT = pytest.mark.parametrize("name", train.MODELS)
PROMPTS = [[3, 1, 4, 1], [5], [9, 2, 6, 5, 3, 5, 8], [9, 7], [4, 4], [2]]


@both
def test_a_batch_of_different_lengths_equals_its_rows(kind):
    model = build(kind)
    together = model.generate(PROMPTS, 20, temperature=0)
    assert together == [model.generate([prompt], 20, temperature=0)[0] for prompt in PROMPTS]
    assert together == [continuation(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(row) for row in together}) > 2


@both
def test_a_stopped_row_keeps_its_ids_and_the_others_go_on(kind):
    model = build(kind)
    full = model.generate(PROMPTS, 20, temperature=0)
    stop = (full[0][5], full[2][9])
    def cut(row):
        ends = [i for i, drawn in enumerate(row) if drawn in stop]
        return row[:ends[0]] if ends else row
    assert model.generate(PROMPTS, 20, temperature=0, stop=stop) == [cut(row) for row in full]
    assert any(len(cut(row)) < 20 for row in full)


@both
def test_on_token_hears_every_id_of_every_row_and_the_stop_id(kind):
    model, heard = build(kind), [[] for _ in PROMPTS]
    full = model.generate(PROMPTS, 20, temperature=0)
    stop = (full[0][5],)
    new = model.generate(PROMPTS, 20, temperature=0, stop=stop,
                         on_token=lambda row, drawn: heard[row].append(drawn))
    for row, ids in enumerate(new):
        assert heard[row] == ids + ([stop[0]] if len(ids) < 20 else [])


@both
def test_going_on_from_a_state_equals_one_long_prompt(kind):
    """Three turns of a conversation, computing only what is new, against recomputing all of it."""
    model, ids = build(kind), []
    state = model.new_state(1, 40)
    for turn in ([3, 1, 4], [1, 5, 9, 2], [6]):
        ids += turn
        [new] = model.generate([ids[int(state.position):]], 6, state=state, temperature=0)
        assert new == continuation(model, ids, 6)
        ids += new
        assert int(state.position) == len(ids) - 1                      # the last id drawn is not in it


@both
def test_a_clone_branches_and_never_shares(kind):
    model = build(kind)
    state = model.new_state(1, 40)
    model.generate([[3, 1, 4]], 0, state=state)
    copy = state._make(map(torch.clone, state))
    first = model.generate([[7]], 8, state=state, temperature=0)
    assert int(copy.position) == 3
    assert model.generate([[7]], 8, state=copy, temperature=0) == first
    assert model.generate([[3, 1, 4, 7]], 8, temperature=0) == first


@both
def test_a_saved_state_goes_on_like_the_live_one(kind, tmp_path):
    model = build(kind)
    state = model.new_state(1, 40)
    model.generate([[3, 1, 4]], 5, state=state, temperature=0)
    save_file(state._asdict(), tmp_path / "state")
    again = type(state)(**load_file(tmp_path / "state"))
    assert model.generate([[8]], 6, state=again, temperature=0) == model.generate(
        [[8]], 6, state=state, temperature=0)


@both
def test_a_long_prompt_in_pieces_equals_one_pass(kind):
    if kind == "gpt":
        model = GPT(GPTConfig.sized(1, 32, 61, 1400)).eval()
    else:
        model = build(kind)
    prompt = torch.randint(61, (1300,), generator=torch.Generator().manual_seed(0)).tolist()
    state = model.new_state(1, 1300)
    with torch.no_grad():
        assert_close(model.read_prompts([prompt], state), model(torch.tensor([prompt]))[:, -1], 1e-5)
    assert int(state.position) == 1300


@bounded
def test_rows_end_when_the_context_is_full(kind):
    model = build(kind)
    new = model.generate([[1] * 35, [2] * 40, [3] * 3], 100, temperature=0)
    assert [len(row) for row in new] == [5, 0, 37]


@both
def test_a_toy_has_no_limit(kind):
    if kind != "gpt":
        assert len(build(kind).generate([[1]], 60, seed=0)[0]) == 60


@both
def test_the_seed_decides_the_draw(kind):
    model = build(kind)
    def draw(seed):
        return model.generate(PROMPTS, 15, seed=seed)
    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    draw(1)
    assert torch.equal(torch.rand(1), before)                           # the global generator is untouched


IMPOSSIBLE = [
    (dict(prompts=[]), "empty prompt"), (dict(prompts=[[1], []]), "empty prompt"),
    (dict(prompts=[[1, 61]]), "61.*0 to 60"), (dict(prompts=[[-1]]), "-1"),
    (dict(max_new_tokens=-1), "max_new_tokens.*-1"), (dict(temperature=-0.5), "temperature.*-0.5"),
    (dict(temperature=math.nan), "temperature"), (dict(top_k=0), "top_k.*0"),
    (dict(top_p=1.5), "top_p.*1.5"), (dict(top_p=math.nan), "top_p"),
    (dict(prompts=[5, 9, 2]), "list of lists of ints.*found 5"), (dict(prompts="text"), "lists of ints"),
    (dict(prompts=["text"]), "lists of ints"), (dict(prompts=[[1, 2.5]]), "lists of ints.*2.5"),
    (dict(prompts=torch.tensor([[5, 9]])), "lists of ints.*tensor"),
    (dict(prompts=[torch.tensor([5, 9])]), "lists of ints.*tensor"),
    (dict(stop=torch.tensor(43)), "stop as an int or a list of ints.*tensor"),
    (dict(stop=torch.tensor([43, 44])), "stop as an int.*tensor"), (dict(stop="."), "stop as an int"),
    (dict(stop=[4.0]), "stop as an int"), (dict(stop=4.0), "stop as an int")]


@both
def test_impossible_requests_are_one_clear_error(kind):
    model = build(kind)
    for change, words in IMPOSSIBLE:
        with pytest.raises(ValueError, match=words) as caught:
            model.generate(**{"prompts": [[1]], "max_new_tokens": 3, **change})
        assert "\n" not in str(caught.value), change
    for change in (dict(temperature=0), dict(top_k=1), dict(top_p=0), dict(top_p=1), dict(top_k=61),
                   dict(prompts=[(0, 60)]), dict(stop=()), dict(stop={3}), dict(stop=3)):
        model.generate(**{"prompts": [[1]], "max_new_tokens": 1, **change})
    assert model.generate([[1], [2, 3]], 0) == [[], []]


@both
def test_a_seeded_draw_is_the_one_of_torch_from_the_logits_of_all_that_came_before(kind):
    """Written out, for one prompt: a generator on the CPU, one multinomial draw a token."""
    model, tokens = build(kind), [3, 1, 4]
    [new] = model.generate([tokens], 12, temperature=0.7, seed=5)
    dice = torch.Generator().manual_seed(5)
    for token in new:
        with torch.no_grad():
            p = (model(torch.tensor([tokens]))[0, -1] / 0.7).softmax(-1)
        assert token == int(torch.multinomial(p, 1, generator=dice))
        tokens = [*tokens, token]
    assert len(new) == 12


@both
def test_prompts_of_one_length_are_read_together_in_pieces_of_512(kind, monkeypatch):
    model, shapes, asked = build(kind), [], []
    if kind == "gpt":
        model = GPT(GPTConfig.sized(1, 32, 61, 700)).eval()
    forward, new_state = type(model).forward, type(model).new_state

    def watched(self, tokens, state=None, last=False):
        shapes.append((*tokens.shape, last))
        return forward(self, tokens, state, last)

    def counted(self, batch_size, max_tokens):
        asked.append((batch_size, max_tokens))
        return new_state(self, batch_size, max_tokens)
    monkeypatch.setattr(type(model), "forward", watched)
    monkeypatch.setattr(type(model), "new_state", counted)
    model.generate([[1] * 515, [2], [3] * 515, [4]], 3, stop=())
    assert shapes == [(2, 1, True), (2, 512, True), (2, 3, True), (4, 1, True), (4, 1, True)]
    assert asked == [(4, 517)]               # the last token drawn is not fed
    asked.clear()
    model.generate([[1] * 5], 0)
    model.generate([[1] * 5], 1)
    assert asked == [(1, 5), (1, 5)]


@bounded
def test_prompts_that_do_not_fit_are_an_error_with_both_numbers(kind):
    model = build(kind)
    with pytest.raises(ValueError, match=r"41.*40"):
        model.generate([[1] * 41], 1)
    with pytest.raises(ValueError, match=r"9 tokens.*made for 8"):
        model.generate([[1] * 4], 6, state=model.new_state(1, 8))
    with pytest.raises(ValueError, match="2 prompts"):
        model.generate([[1], [2]], 1, state=model.new_state(1, 8))
    state = model.new_state(1, 40)
    model.generate([[1] * 30], 0, state=state)
    with pytest.raises(ValueError, match=r"41.*40"):
        model.generate([[1] * 11], 1, state=state)


@bounded
def test_a_state_with_two_of_forty_tokens_left_takes_two_more(kind):
    model, tokens = build(kind), [int(t) for t in torch.arange(40) * 7 % 61]
    state = model.new_state(1, 40)
    assert model.generate([tokens[:38]], 0, state=state) == [[]] and int(state.position) == 38
    last = state._make(map(torch.clone, state))
    with torch.no_grad():
        whole = model(torch.tensor([tokens]))
        for i in (38, 39):
            assert_close(model(torch.tensor([[tokens[i]]]), last)[0, 0], whole[0, i], 1e-5, f"token {i}")
        with pytest.raises(ValueError, match="40"):
            model(torch.tensor([[1]]), last)
    [new] = model.generate([[tokens[38]]], 9, state=state, temperature=0, stop=())
    assert new == [int(whole[0, 38].argmax())] and int(state.position) == 39
    assert model.generate([[tokens[39]]], 9, state=state, temperature=0, stop=()) == [[]]
    assert int(state.position) == 40


def test_broken_weights_are_an_error_not_nonsense():
    model = build("gpt")
    model.ln_f.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        model.generate([[1]], 3)


# --- sampling ---

def cases(golden, kind):
    for case in json.loads((golden / "sampling.json").read_text())[kind]:
        logits = torch.tensor([[float(x) for x in case["logits"]]])
        yield case, logits, {i for i, x in enumerate(logits[0].tolist()) if x > -math.inf}


def test_top_p_keeps_what_meta_keeps(golden):
    count = 0
    for case, logits, possible in cases(golden, "top_p"):
        kept = probabilities(logits, case["temperature"], None, case["top_p"])[0].nonzero()[:, 0]
        assert set(kept.tolist()) == set(case["kept_meta"]) & possible, case
        count += 1
    assert count > 20


def test_top_k_keeps_what_nanogpt_keeps(golden):
    for case, logits, possible in cases(golden, "top_k"):
        kept = probabilities(logits, 1.0, case["top_k"], None)[0].nonzero()[:, 0]
        assert set(kept.tolist()) == set(case["kept_nanogpt"]) & possible, case


def of(name):
    """The module of a model, where `probabilities` and `sample` stand."""
    return sys.modules[train.model_parts(name)[0].__module__]


E = math.e
KEPT = (         # logits, temperature, top_k, top_p: sampling probabilities, not yet summing to 1
    ([0, 2, 1], 1, None, 0.5, [0, E**2, 0], 1 + E + E**2),              # an order of three, not of two
    ([0, 2, 1], 1, None, 0.8, [0, E**2, E], 1 + E + E**2), ([1, 0, 2], 1, None, 0.8, [E, 0, E**2], 1 + E + E**2),
    ([0, 2, 1], 1, None, 0.0, [0, E**2, 0], 1 + E + E**2), ([0, 2, 1], 1, None, 1.0, [1, E**2, E], 1 + E + E**2),
    ([0, 2, 1], 1, None, None, [1, E**2, E], 1 + E + E**2), ([0, 4, 2], 2, None, None, [1, E**2, E], 1 + E + E**2),
    ([0, 2, 1], 1, 1, None, [0, 1, 0], 1), ([0, 2, 1], 1, 2, None, [0, E, 1], 1 + E),
    ([0, 2, 1], 1, 3, None, [1, E**2, E], 1 + E + E**2), ([0, 2, 1], 1, 9, None, [1, E**2, E], 1 + E + E**2),
    ([1, 2, 2, 1], 1, 1, None, [0, 1, 1, 0], 2), ([1, 2, 2, 1], 1, 3, None, [1, E, E, 1], 2 + 2 * E),
    ([0, 4, 2], 2, 2, 0.7, [0, E, 0], 1 + E), ([0, 0, 0, 0], 1, None, 0.5, [1, 1, 1, 0], 4),
    ([0, 0, 0, 0], 1, None, 0.49, [1, 1, 0, 0], 4))                     # ties: the first of them


@EIGHT
def test_every_file_keeps_the_tokens_that_temperature_top_k_and_top_p_say(name):
    for logits, temperature, top_k, top_p, weights, total in KEPT:
        two = torch.tensor([logits, logits[::-1]], dtype=torch.float32)
        got = of(name).probabilities(two, temperature, top_k, top_p)
        want = torch.tensor(weights, dtype=torch.float32) / total
        assert_close(got[0], want, 1e-6, f"{logits} {temperature} {top_k} {top_p}")
        if len({*logits}) == len(logits):
            assert_close(got[1], want.flip(0), 1e-6, "the second row, reversed")
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(of(name).probabilities(logits, 0.8, 200, 0.9), probabilities(logits, 0.8, 200, 0.9))
    falling, order = logits.softmax(-1).sort(descending=True, stable=True)
    for top_p in (0.3, 0.9, 0.9999):
        want = falling.masked_fill(falling.cumsum(-1) - falling > top_p, 0.0)
        assert torch.equal(of(name).probabilities(logits, 1.0, None, top_p).gather(-1, order), want)


@EIGHT
def test_every_file_draws_in_fp32_on_the_seed_and_refuses_broken_logits(name):
    sample = of(name).sample
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(sample(logits, 0, None, None, None), logits.argmax(-1))
    for temperature, top_k, top_p in ((1.0, None, None), (0.7, 9, None), (1.3, None, 0.8)):
        want = torch.multinomial(probabilities(logits.float(), temperature, top_k, top_p), 1,
                                 generator=torch.Generator().manual_seed(3))[:, 0]
        got = sample(logits, temperature, top_k, top_p, torch.Generator().manual_seed(3))
        assert torch.equal(got, want) and got.dtype == torch.int64
    for bad in (math.nan, math.inf):
        broken = logits.clone()
        broken[1, 7] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            sample(broken, 0, None, None, None)
    banned = logits.float().clone()
    banned[:, 1:] = -math.inf
    assert sample(banned, 1.0, None, None, torch.Generator()).tolist() == [0, 0, 0]


def test_one_stop_token_is_given_as_it_is_or_in_a_list():
    model = build("gpt")
    [full] = model.generate([[3, 1, 4]], 20, temperature=0)
    for stop in (full[5], [full[5]], (full[5],), {full[5]}):
        assert model.generate([[3, 1, 4]], 20, temperature=0, stop=stop) == [full[:full.index(full[5])]]


def test_a_temperature_near_zero_is_greedy():
    model = build("gpt")
    greedy = model.generate(PROMPTS, 12, temperature=0)
    for temperature in (1e-9, 1e-30, 1e-40, 1e-310, 5e-324):            # fp32 ends at 1e-45
        for top in (dict(), dict(top_k=5), dict(top_p=0.9)):
            assert model.generate(PROMPTS, 12, temperature=temperature, seed=1, **top) == greedy
    probs = probabilities(torch.tensor([[-3e4, 3e4, -math.inf]]), 1e-40, None, 0.9)
    assert probs.tolist() == [[0.0, 1.0, 0.0]]


def test_top_p_among_the_likely_tokens_equals_top_p_among_all():
    """Bit for bit, with ties, tokens that cannot be drawn, and from peaked to nearly flat."""
    random = torch.Generator().manual_seed(0)
    for trial in range(60):
        size, scale = 2 + 31 * trial, 10 ** (trial % 5 / 2 - 1)
        logits = torch.randn(1 + trial % 3, size, generator=random) * scale
        logits = logits.round() if trial % 2 else logits
        logits[:, 1::7] = -math.inf if trial % 3 else 0.0
        whole = probabilities(logits, 0.8, None, None)
        for top_p in (0.0, 0.1, 0.5, 0.9, 0.99, 0.9999):
            falling, order = whole.sort(dim=-1, descending=True, stable=True)
            beyond = falling.cumsum(-1) - falling > top_p
            want = whole.scatter(-1, order, falling.masked_fill(beyond, 0.0))
            assert torch.equal(probabilities(logits, 0.8, None, top_p), want), (trial, top_p)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    for temperature, top_k, top_p in ((1.0, None, None), (0.5, None, None), (1.0, 2, None), (2.0, 3, 0.8)):
        drawn = sample(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
        share = torch.bincount(drawn, minlength=4) / 20000
        want = probabilities(logits[:1], temperature, top_k, top_p)[0]
        assert (share - want / want.sum()).abs().max() < 0.015


def test_the_state_of_the_toy_is_fp32_for_any_parameters():
    state = Toy(ToyConfig()).bfloat16().new_state(2, 5)
    assert isinstance(state, ToyState) and state.memory.dtype == torch.float32
