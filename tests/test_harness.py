"""The model that lm-evaluation-harness sees, against the plain forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from test_gguf_model import GLM, random_weights

from qatmoe import harness, loss
from qatmoe.data import tokenizer
from qatmoe.mesh import local_mesh
from qatmoe.model import transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTEXT = 40
CFG = dataclasses.replace(GLM, vocab_size=2048, scan_layers=False, n_layers=2)
PARAMS = jax.tree.map(jnp.asarray, random_weights(CFG, 3))
MESH = local_mesh()
TOKENIZER = tokenizer.load()
TEXT = "She had been looking at him with an expression of great surprise, and now she rose; the room was very still."


@pytest.fixture(scope="module")
def model():
    return harness.Model(PARAMS, CFG, MESH, TOKENIZER, CONTEXT, tokens=160)


@jax.jit
def reference(tokens_BL):
    cfg = dataclasses.replace(CFG, eval_experts="reference")
    hidden_BLD = transformer.forward(PARAMS, cfg, tokens_BL, train=False).hidden_BLD
    return transformer.logits(PARAMS, cfg, hidden_BLD)


def plain(tokens):
    """Log-probabilities of what follows each token, (L, V) f64: one row, every expert on every token."""
    logits_LV = np.asarray(reference(np.pad(tokens, (0, 64 - len(tokens)))[None])[0, : len(tokens)], np.float64)
    return logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True))


def nats(tokens, predicted):
    """Sum over the last `predicted` tokens by hand."""
    scores = plain(tokens[:-1])
    return sum(scores[i - 1, tokens[i]] for i in range(len(tokens) - predicted, len(tokens)))


def ask(model, *pairs):
    return model.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], True)


def generate(model, context, **options):
    return model.generate_until([Instance("generate_until", {}, (context, options), 0)])[0]


# ---- log-likelihoods -------------------------------------------------------------------------------------------------


def test_loglikelihood_is_the_sum_of_the_continuations_log_probabilities(model):
    context, continuation = "She had been looking at him", " with an expression"
    whole, before = model.tok_encode(context + continuation), model.tok_encode(context)
    [(total, greedy)] = ask(model, (context, continuation))
    assert total == pytest.approx(nats(whole, len(whole) - len(before)), abs=1e-4)
    assert not greedy


def test_a_boundary_inside_a_token_is_where_the_harness_has_it(model):
    context, continuation = "She had been look", "ing at him"
    whole, before = model.tok_encode(context + continuation), model.tok_encode(context)
    after = whole[len(before) :]
    assert whole[: len(before)] != before and after != model.tok_encode(continuation)  # "looking" is one token
    # As its Hugging Face models do: the context's own tokens, then what is left of the whole text's.
    expected = nats([*before, *after], len(after))
    assert ask(model, (context, continuation))[0][0] == pytest.approx(expected, abs=1e-4)


def test_white_space_at_the_end_of_a_context_belongs_to_the_continuation(model):
    assert ask(model, ("She had been ", "looking")) == ask(model, ("She had been", " looking"))


def test_an_empty_context_is_the_end_of_the_text_before(model):
    tokens = [TOKENIZER.end_id, *model.tok_encode("She had been")]
    assert ask(model, ("", "She had been"))[0][0] == pytest.approx(nats(tokens, len(tokens) - 1), abs=1e-4)


def test_long_contexts_are_cut_on_the_left(model):
    tokens = model.tok_encode(TEXT * 3 + " Anne")
    before = len(model.tok_encode(TEXT * 3))
    predicted = len(tokens) - before
    assert before > 2 * CONTEXT
    kept = tokens[-(CONTEXT + 1) :]
    assert ask(model, (TEXT * 3, " Anne"))[0][0] == pytest.approx(nats(kept, predicted), abs=1e-4)


def test_greedy_is_only_what_the_model_would_say(model):
    tokens = model.tok_encode("She had been")
    said = list(tokens)
    for _ in range(4):
        said.append(int(plain(said)[-1].argmax()))
    best = said[len(tokens) :]
    last_other = [*best[:-1], (best[-1] + 1) % CFG.vocab_size]
    first_other = [(best[0] + 1) % CFG.vocab_size, *best[1:]]
    found = model._loglikelihood_tokens([(("", ""), tokens, c) for c in (best, last_other, first_other, best[:1])])
    assert [greedy for _, greedy in found] == [True, False, False, True]
    assert found[0][0] == pytest.approx(nats(said, 4), abs=1e-4)


def test_answers_do_not_depend_on_the_batch_and_come_in_order(model):
    pairs = [(TEXT[: 7 * i % 100], TEXT[7 * i % 100 : 7 * i % 100 + 3 + i]) for i in range(25)]
    together = ask(model, *pairs)
    alone = [ask(model, pair)[0] for pair in pairs]
    np.testing.assert_allclose([t for t, _ in together], [t for t, _ in alone], atol=1e-4)


def test_few_programs_are_compiled(model):
    assert harness._padded(1, 4096) == 32 and harness._padded(33, 4096) == 64 and harness._padded(64, 4096) == 64
    assert harness._padded(33, 40) == 40 and harness._padded(5, 8) == 8
    before = harness._score._cache_size()
    ask(model, *[(TEXT[:i], TEXT[i : i + 9]) for i in range(1, 100, 3)])
    assert harness._score._cache_size() - before <= 2  # of 32 and 40 tokens


def test_a_sequence_longer_than_a_batch_is_one_of_its_own(model):
    small = harness.Model(PARAMS, CFG, MESH, TOKENIZER, CONTEXT, tokens=10)
    assert ask(small, (TEXT, " Anne"))[0][0] == pytest.approx(ask(model, (TEXT, " Anne"))[0][0], abs=1e-4)


def test_an_empty_continuation_is_certain(model):
    assert model._loglikelihood_tokens([(("", ""), [5, 6, 7], [])]) == [(0.0, True)]


# ---- whole texts -----------------------------------------------------------------------------------------------------


def rolling(model, text):
    return model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])[0]


def test_a_short_texts_rolling_sum_is_the_total_of_its_token_losses(model):
    tokens = np.array([[TOKENIZER.end_id, *model.tok_encode(TEXT[:60])]])
    assert tokens.size <= CONTEXT

    @jax.jit
    def losses(tokens_BL):
        hidden_BLD = transformer.forward(PARAMS, CFG, tokens_BL[:, :-1], train=False).hidden_BLD
        return loss.token_losses(PARAMS, CFG, hidden_BLD, tokens_BL[:, 1:])[0]

    ce_BL = losses(tokens)
    assert rolling(model, TEXT[:60]) == pytest.approx(-float(ce_BL.sum()), abs=1e-3)


def test_a_long_text_is_predicted_in_windows_each_token_once(model):
    tokens = model.tok_encode(TEXT * 4)
    whole = [TOKENIZER.end_id, *tokens]
    expected, done = nats(whole[: CONTEXT + 1], CONTEXT), CONTEXT
    while done < len(tokens):  # the last window looks back as far as it can
        new = min(CONTEXT, len(tokens) - done)
        done += new
        expected += nats(whole[done - CONTEXT : done + 1], new)
    assert len(tokens) > 2 * CONTEXT and len(tokens) % CONTEXT
    assert rolling(model, TEXT * 4) == pytest.approx(expected, abs=1e-2)
    continuation = model._loglikelihood_tokens([(("", ""), [TOKENIZER.end_id], tokens)])
    assert continuation[0][0] == rolling(model, TEXT * 4)


def test_an_empty_text_has_no_surprise(model):
    assert rolling(model, "") == 0.0


# ---- generation ------------------------------------------------------------------------------------------------------


def test_generation_is_greedy_and_as_long_as_asked(model):
    tokens = model.tok_encode("She had been")
    said = list(tokens)
    for _ in range(5):
        said.append(int(plain(said)[-1].argmax()))
    assert generate(model, "She had been", max_gen_toks=5, until=[]) == TOKENIZER.decode(said[len(tokens) :])
    assert generate(model, "She had been", max_new_tokens=5, do_sample=False, temperature=0.7) == TOKENIZER.decode(
        said[len(tokens) :]
    )


def test_generation_stops_at_the_first_stop_string(model):
    text = generate(model, "She had been", max_gen_toks=12)
    assert len(text) > 8
    stop, later = text[5:7], text[7:9]
    assert generate(model, "She had been", max_gen_toks=12, until=[later, stop]) == text[: text.index(stop)]
    assert generate(model, "She had been", max_gen_toks=12, until=stop) == text[: text.index(stop)]
    assert generate(model, "She had been", max_gen_toks=12, until=["", "no such thing"]) == text
    assert generate(model, "She had been", max_gen_toks=12, until="") == text


def test_generation_stops_at_the_end_of_the_text():
    params = dict(PARAMS, head=np.zeros_like(PARAMS["head"]))  # all scores are equal: the first token is said
    assert TOKENIZER.end_id == 0
    assert generate(harness.Model(params, CFG, MESH, TOKENIZER, CONTEXT), "She had been") == ""


def test_a_prompt_leaves_room_for_what_is_asked(model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        harness, "generate", lambda p, c, prompt, **options: asked.append((prompt, options)) or iter(())
    )
    tokens = model.tok_encode(TEXT * 2)
    generate(model, TEXT * 2, max_gen_toks=10)
    generate(model, TEXT * 2)  # as many as the harness's models give, which do not fit
    generate(model, "", do_sample=True, top_k=5, top_p=0.9)
    assert asked[0][0] == tokens[-30:] and asked[0][1]["max_tokens"] == 10
    assert asked[1][0] == tokens[-20:] and asked[1][1]["max_tokens"] == 20
    assert asked[2][0] == [TOKENIZER.end_id]
    assert asked[2][1] | {"top_k": 5, "top_p": 0.9, "temperature": 1.0} == asked[2][1]
    assert not {"temperature", "top_k"} & set(asked[0][1])


def test_repeats_of_a_request_draw_other_texts(model):
    def ask(count):
        options = {"max_gen_toks": 8, "temperature": 1.0}
        return model.generate_until([Instance("generate_until", {}, ("She", options), 0, repeats=count)] * count)

    three = ask(3)
    assert len(set(three)) == 3 and ask(2) == three[:2]
