"""Tests that teach: each states one idea of the course with numbers, and holds gpt.py to it."""
import math

import numpy as np
import torch
from torch.nn import functional as F
from train import Batches, Run

from gpt import GPT, Attention, GPTConfig, probabilities, store

RUN = Run(torch.device("cpu"), torch.float32)


def test_a_text_becomes_sliding_windows_whose_targets_are_one_ahead():
    ids = np.arange(10, 21)                                            # a text of 11 tokens: 10 ... 20
    windows = Batches(ids, context=4, sequences=3, micro=3, seed=0, run=RUN)
    pairs = sorted(zip(*(part.tolist() for part in windows(0)[0].values())))
    assert pairs == [([10, 11, 12, 13], [11, 12, 13, 14]),
                     ([14, 15, 16, 17], [15, 16, 17, 18]),
                     ([16, 17, 18, 19], [-100, -100, 19, 20])]          # 17 and 18 were targets before


def test_an_embedding_is_a_product_with_one_hot_vectors():
    table = torch.randn(6, 3)
    tokens = torch.tensor([2, 5, 2])
    one_hot = F.one_hot(tokens, 6).float()                             # (3, 6)
    assert torch.equal(F.embedding(tokens, table), one_hot @ table)


def test_attention_is_a_weighted_mean_of_values_seen_so_far():
    """One head, three positions, by hand."""
    q = k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    v = torch.tensor([[10.0], [20.0], [30.0]])
    scores = q @ k.T / math.sqrt(2)
    allowed = torch.ones(3, 3).tril().bool()                           # position 0 sees only itself
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    assert weights[0].tolist() == [1, 0, 0]
    assert torch.allclose(weights.sum(-1), torch.ones(3))
    want = weights @ v
    assert torch.allclose(F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0], want)


def one_by_one(x, layer):
    """What gpt.py's attention computes, written with a loop over heads and a softmax to read."""
    T, C = x.shape
    q, k, v = layer.c_attn(x).split(C, dim=1)
    heads, D = [], C // layer.heads
    for h in range(layer.heads):
        part = slice(h * D, (h + 1) * D)
        scores = q[:, part] @ k[:, part].T / math.sqrt(D)
        scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, part])
    return layer.c_proj(torch.cat(heads, dim=1))


def test_many_heads_are_one_head_after_another():
    torch.manual_seed(0)
    layer, x = Attention(GPTConfig.sized(1, 192, 50, 16)), torch.randn(7, 192)
    assert layer.heads == 3
    together = layer(x[None], None, None)[0]
    assert torch.allclose(together, one_by_one(x, layer), atol=1e-5)


def test_a_cache_of_keys_and_values_gives_what_recomputing_gives():
    torch.manual_seed(0)
    layer, x = Attention(GPTConfig.sized(1, 128, 50, 16)).eval(), torch.randn(1, 6, 128)
    whole = layer(x, None, None)
    keys, values = torch.zeros(1, 2, 6, 64), torch.zeros(1, 2, 6, 64)   # (B, H, M, D)
    with torch.no_grad():
        for t in range(6):                                             # one token at a time
            mask = (torch.arange(6) <= t)[None, None, None]
            step = layer(x[:, t:t + 1], mask, (keys, values, (..., slice(t, t + 1), slice(None))))
            assert torch.allclose(step, whole[:, t:t + 1], atol=1e-5)


def test_store_writes_into_the_cache():
    cache = torch.zeros(1, 1, 4, 2)
    store(cache, (..., torch.tensor([2]), slice(None)), torch.ones(1, 1, 1, 2))
    assert cache[0, 0, :, 0].tolist() == [0, 0, 1, 0]


def test_the_future_does_not_change_the_past():
    torch.manual_seed(0)
    model = GPT(GPTConfig.sized(2, 64, 50, 16)).eval()
    tokens = torch.randint(50, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = 7
    assert torch.allclose(model(tokens)[:, :8], model(changed)[:, :8], atol=1e-6)
    assert not torch.allclose(model(tokens)[:, 8:], model(changed)[:, 8:], atol=1e-3)


def test_layer_norm_gives_mean_zero_and_variance_one():
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    by_hand = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(F.layer_norm(x, (4,)), by_hand)


def test_an_untrained_model_guesses_evenly():
    torch.manual_seed(0)
    model = GPT(GPTConfig.sized(2, 64, 1000, 16))
    tokens = torch.randint(1000, (4, 16))
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(1000)) < 0.1                      # 6.9 nats: one in a thousand


def test_temperature_sharpens_and_top_k_and_top_p_cut():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    def probs(*how):
        p = probabilities(logits, *how)[0]
        return [round(x, 3) for x in (p / p.sum()).tolist()]
    assert probs(1.0, None, None) == [0.665, 0.245, 0.09]
    assert probs(0.5, None, None) == [0.867, 0.117, 0.016]
    assert probs(1.0, 2, None) == [0.731, 0.269, 0.0]
    assert probs(1.0, None, 0.7) == [0.731, 0.269, 0.0]                 # 0.665 does not reach 0.7: one more
