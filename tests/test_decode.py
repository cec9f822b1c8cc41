"""Decoding a token at a time against the forward pass over the whole text, and the choice of tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward_scores

from qatmoe import decode, plan, shapes
from qatmoe.config import ModelConfig
from qatmoe.data import tokenizer
from qatmoe.decode import Decoder, generate, probabilities, stream_text
from qatmoe.errors import UserError
from qatmoe.model import transformer
from qatmoe.model.cache import CacheType

CFG = ModelConfig(
    vocab_size=48, dim=16, n_layers=2, dense_dim=24, n_heads=4, n_kv_heads=2, head_dim=64, n_experts=4, expert_dim=8,
    init_std=0.3, expert_block=4,
)  # fmt: skip
ARCHITECTURES = {
    "glm": dataclasses.replace(CFG, qkv_bias=True, routed_scale=1.5),
    "olmoe": dataclasses.replace(
        CFG, qk_norm="full", router="softmax", router_bias=False, norm_topk=False, n_shared_experts=0, n_dense_layers=0,
        n_mtp=0, tie_embeddings=True, rotary_fraction=1.0, scan_layers=False,
    ),
    "clamped": dataclasses.replace(CFG, qk_norm="none", swiglu_limit=0.5, eval_experts="reference"),
    "bfloat16": dataclasses.replace(CFG, dtype="bfloat16"),
}  # fmt: skip
TOKENS = np.asarray(jax.random.randint(jax.random.key(1), (24,), 0, 48))

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def params_of(cfg):
    """Random parameters, biases and norms too."""

    @jax.jit
    def draw():
        noise = iter(jax.random.split(jax.random.key(2), 200))
        params = transformer.init_params(cfg, jax.random.key(1))
        return jax.tree.map(lambda a: a + 0.05 * jax.random.normal(next(noise), a.shape), params)

    return draw()


def fed(cfg, cache, prompt, tokens=TOKENS):
    """Scores from position prompt - 1 on: the prompt at once, then one by one."""
    decoder = Decoder(params_of(cfg), cfg, len(tokens), cache)
    rows = [decoder.feed(tokens[:prompt])]
    rows += [decoder.feed(tokens[i : i + 1]) for i in range(prompt, len(tokens))]
    assert decoder.used == len(tokens)
    return jnp.stack(rows)


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_forward_pass(name):
    cfg = ARCHITECTURES[name]
    expected = forward_scores(cfg, None, params_of(cfg), TOKENS)
    half = cfg.dtype == "bfloat16"
    got = fed(cfg, CacheType("bf16", "bf16") if half else None, 13)  # keys are bfloat16 there anyway
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected[12:], rtol=0.1 if half else 1e-3, atol=0.1 if half else 1e-4)


@pytest.mark.parametrize("name", ["bf16", "q8_0", "q4_0", "iq4_nl+rot", "q8_0/q4_0+rot"])
def test_equals_the_forward_pass_through_the_same_cache(name):
    cache, params = CacheType.parse(name), params_of(CFG)
    expected = forward_scores(CFG, cache, params, TOKENS)[12:]
    difference = np.abs(fed(CFG, cache, 13) - expected)
    effect = np.max(np.abs(forward_scores(CFG, None, params, TOKENS)[12:] - expected))
    assert np.median(difference) < 1e-4
    assert np.max(difference) < 0.2 * effect  # a value that float rounding moves across the boundary of two codes


def test_prompts_longer_than_a_run(monkeypatch):
    """13 tokens in runs of 8, 4 and 1, where a padded 8 would not fit, and 3 more in one of 4."""
    monkeypatch.setattr(decode, "RUNS", (1, 4, 8))
    expected = forward_scores(CFG, None, params_of(CFG), TOKENS)
    decoder = Decoder(params_of(CFG), CFG, 16)
    assert decoder.length == 16
    decoder.used = 4
    assert list(decoder._runs(12)) == [(8, 8), (4, 4)]
    decoder.used = 0
    assert list(decoder._runs(13)) == [(8, 8), (8, 5)]
    np.testing.assert_allclose(decoder.feed(TOKENS[:13]), expected[12], rtol=1e-3, atol=1e-4)
    assert list(decoder._runs(3)) == [(1, 1)] * 3
    np.testing.assert_allclose(decoder.feed(TOKENS[13:16]), expected[15], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="17 tokens do not fit a cache of 16"):
        decoder.feed([1])


def test_few_programs_are_compiled():
    cfg = dataclasses.replace(CFG, norm_eps=2e-5)  # of no other test
    before = decode._feed._cache_size()
    for prompt in (2, 9, 15, 16):
        fed(cfg, None, prompt, TOKENS[:18])
    assert decode._feed._cache_size() - before == 2


@pytest.mark.parametrize("name", ["f32", "bf16", "q8_0", "q4_0", "iq4_nl", "f32/q4_0+rot"])
def test_the_cache_takes_the_memory_of_its_type(name):
    cache = CacheType.parse(name)
    decoder = Decoder(params_of(CFG), CFG, 300, cache)
    assert decoder.length == 512
    counted = plan.cache_bytes(shapes.from_model("", CFG, 512, 0.0), cache, 512)
    assert counted == CFG.n_layers * 512 * cache.bytes(128, 128)
    assert taken(decoder) == counted
    decoder.feed([1])
    assert taken(decoder) == counted


def taken(decoder):
    return sum(array.nbytes for array in jax.tree.leaves(decoder._memory))


def test_a_cache_larger_than_the_memory_is_refused():
    with pytest.raises(UserError, match=r"a cache of 2000000256 tokens in q4_0 takes 576,000,073,728 bytes .* fewer"):
        generate(params_of(CFG), CFG, TOKENS, max_tokens=2_000_000_000, cache=CacheType.parse("q4_0"))


def test_warming_up_compiles_all_and_takes_a_prompt_in_only_once(monkeypatch):
    monkeypatch.setattr(decode, "RUNS", (1, 8))
    cfg, fed_lengths, feed = dataclasses.replace(CFG, norm_eps=3e-5), [], Decoder.feed  # of no other test
    monkeypatch.setattr(Decoder, "feed", lambda self, ids: fed_lengths.append(len(ids)) or feed(self, ids))
    options = {"max_tokens": 3, "temperature": 1.0}
    tokens = generate(params_of(CFG), cfg, TOKENS, warm_up=True, **options)
    assert fed_lengths == [1, 8]
    compiled = decode._feed._cache_size(), decode._draw._cache_size()
    found = list(tokens)
    assert fed_lengths == [1, 8, 24, 1, 1]
    assert (decode._feed._cache_size(), decode._draw._cache_size()) == compiled
    assert found == list(generate(params_of(CFG), cfg, TOKENS, **options))


# ---- the distribution ------------------------------------------------------------------------------------------------

P = np.array([0.1, 0.4, 0.05, 0.25, 0.2])  # by falling probability: 1, 3, 4, 0, 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((1.0, 0, 1.0), P),
        ((1.0, 2, 1.0), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ((1.0, 9, 1.0), P),
        ((1.0, 0, 0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ((1.0, 0, 0.66), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ((1.0, 0, 1e-9), [0, 1, 0, 0, 0]),
        ((1.0, 2, 0.61), [0, 1, 0, 0, 0]),  # of the two that are left the first has 0.615
        ((0.5, 0, 1.0), P**2 / np.sum(P**2)),
        ((0.5, 0, 0.6), [0, 0.16 / 0.2225, 0, 0.0625 / 0.2225, 0]),  # squared and renormalised: 0.58, 0.23, 0.15, ...
        ((2.0, 1, 1.0), [0, 1, 0, 0, 0]),
    ],
)
def test_distribution(options, expected):
    scores = jnp.log(jnp.asarray(P, jnp.float32)) + 3.0
    np.testing.assert_allclose(probabilities(scores, *options), expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-42, 1e-60])
def test_the_smallest_temperatures_take_the_most_probable_token(temperature):
    scores = jnp.log(jnp.asarray(P, jnp.float32)) + 30.0
    assert probabilities(scores, temperature, 0, 1.0).tolist() == [0, 1, 0, 0, 0]


def test_top_p_of_one_keeps_all():
    """Also what a sum in float32 does not see."""
    found = probabilities(jnp.array([0.0, -20.0, -21.0]), 1.0, 0, 1.0)
    np.testing.assert_allclose(found, [1, np.exp(-20), np.exp(-21)], rtol=1e-4)
    assert probabilities(jnp.array([0.0, -20.0, -21.0]), 1.0, 0, 0.9).tolist() == [1, 0, 0]


def test_equal_scores_go_to_lower_ids():
    assert probabilities(jnp.zeros(4), 1.0, 2, 1.0).tolist() == [0.5, 0.5, 0, 0]


def test_frequencies_of_draws():
    scores = jnp.log(jnp.asarray(P, jnp.float32))
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.vmap(lambda key: decode._draw(key, scores, 1.0, 4, 0.9))(keys)
    share = np.bincount(drawn, minlength=5) / len(keys)
    expected = np.array([0.1, 0.4, 0, 0.25, 0.2]) / 0.95
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(0.25 / len(keys)))
    assert share[2] == 0


# ---- generation ------------------------------------------------------------------------------------------------------


def generated(seed=0, temperature=1.5, **options):
    options = {"max_tokens": 10} | options
    return list(generate(params_of(CFG), CFG, TOKENS[:5], temperature=temperature, seed=seed, **options))


def greedy_by_hand(cache, count):
    """Over the whole text each time, padded behind what is there."""
    ids = list(TOKENS[:5])
    for _ in range(count):
        padded = np.array(ids + [0] * (24 - len(ids)))
        ids.append(int(jnp.argmax(forward_scores(CFG, cache, params_of(CFG), padded)[len(ids) - 1])))
    return ids[5:]


@pytest.mark.parametrize("name", ["f32", "q4_0+rot"])
def test_the_most_probable_tokens(name):
    cache = CacheType.parse(name)
    expected = greedy_by_hand(None if name == "f32" else cache, 10)
    assert len(set(expected)) > 2
    assert generated(temperature=0.0, cache=cache) == expected
    assert generated(temperature=2.0, top_k=1, cache=cache) == expected
    assert generated(temperature=1e-42, top_k=10**11, cache=cache) == expected


def test_seeds():
    assert generated() == generated()
    assert len({tuple(generated(seed=s)) for s in range(5)}) == 5
    assert generated(max_tokens=4) == generated()[:4]


def test_stops_before_a_stop_token():
    whole = generated()
    at = whole.index(whole[6])
    assert generated(stop_ids=(whole[6],)) == whole[:at]
    assert generated(stop_ids=[i for i in range(48) if i not in whole]) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"seed": -1}, "seed=-1"),
        ({"prompt_ids": []}, "prompt is empty"),
        ({"prompt_ids": [3, 48]}, "token 48 .* 48"),
        ({"prompt_ids": [-1]}, "token -1"),
        ({"cfg": dataclasses.replace(CFG, head_dim=16), "cache": CacheType("q8_0", "f32")}, "head_dim=16"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, message):
    options = {"cfg": CFG, "prompt_ids": [1], "max_tokens": 3} | options
    with pytest.raises(UserError, match=message):
        generate(params_of(CFG), **options)


# ---- text ------------------------------------------------------------------------------------------------------------


def pieces(words, stop=(), prompt=()):
    """What is written for words as tokens; `prompt` words come before."""
    words = [*prompt, *words]
    ids = range(len(prompt), len(words))
    return list(stream_text(ids, lambda ids: "".join(words[i] for i in ids), range(len(prompt)), stop))


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), ["ab", "cd", "ef"]),
        (("z",), ["ab", "cd", "ef"]),
        (("bcde",), ["a"]),
        (("bcX",), ["a", "bcd", "ef"]),
        (("ef", "d"), ["ab", "c"]),
        (("dX", "e"), ["ab", "c", "d"]),
        (("efg",), ["ab", "cd", "ef"]),  # begun, never finished
        (("ab",), []),
        (("f", "bcdef"), ["a"]),
        (("cd", "bc"), ["a"]),
    ],
)
def test_stop_strings_split_over_tokens(stop, expected):
    assert pieces(["ab", "cd", "ef"], stop) == expected


def test_stop_strings_in_what_is_held_until_the_end():
    assert pieces(["a\ufffd"], ("a",)) == []
    assert pieces(["ab\ufffd"], ("b",)) == ["a"]


@pytest.mark.parametrize("text", ["Ab \u65e5\u672c\u8a9e \U0001f600!", "caf\u00e9 \u03b1\u03b2 x"])
def test_characters_split_over_tokens(text):
    tokens = tokenizer.load("default")
    ids = [int(i) for i in tokens.encode(text)]
    assert len(ids) > len(text.split()) * 2
    written = list(stream_text(ids, tokens.decode, tokens.encode("Before\u00e9"), ()))
    assert "".join(written) == text
    assert not any("\ufffd" in piece for piece in written)


def test_an_unfinished_character_is_written_at_the_end():
    tokens = tokenizer.load("default")
    ids = [int(i) for i in tokens.encode("a\U0001f600")]
    assert list(stream_text(ids[:-1], tokens.decode, (), ())) == ["a", "\ufffd"]
    assert "".join(stream_text([*ids[:-1], ids[0]], tokens.decode, (), ())) == "a\ufffda"


def test_text_is_written_before_the_next_token_is_drawn():
    drawn = []

    def tokens():
        for i in range(3):
            drawn.append(i)
            yield i

    stream = stream_text(tokens(), lambda ids: "xyz"[: len(ids)] if 0 in ids else "", (), ())
    assert (next(stream), drawn) == ("x", [0])
    assert (next(stream), drawn) == ("y", [0, 1])


def test_tokenizers_that_write_the_first_token_differently():
    """Without its space, as SentencePiece's do."""
    words = ["one", " two", " three"]

    def decode(ids):
        return "".join(words[i] for i in ids).removeprefix(" ")

    assert list(stream_text([1, 2], decode, [0], ())) == [" two", " three"]
