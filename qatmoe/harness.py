"""A model for lm-evaluation-harness (package lm-eval, extra `eval`).

Importing this module imports that package; `qatmoe.tasks` does so only when it is needed.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows

from qatmoe.config import ModelConfig
from qatmoe.data.tokenizer import Tokenizer
from qatmoe.decode import generate
from qatmoe.mesh import batch_groups, over_rows
from qatmoe.model import transformer
from qatmoe.run import place

_SHORTEST = 32  # tokens that a row is padded to, or a power of two times that
MAX_NEW_TOKENS = 256  # where a task does not say

Window = tuple[int, list[int], int]  # its request; tokens; how many of them, from the last, are predicted


class Model(TemplateLM):
    """Log-likelihoods and text of one set of weights.

    A context that is longer than the model's is cut on the left. A text longer than that is predicted in windows, each
    token once (`get_rolling_token_windows`).
    """

    def __init__(
        self,
        params: dict[str, Any],
        cfg: ModelConfig,
        mesh: Mesh,
        tokenizer: Tokenizer,
        context: int,
        tokens: int = 4096,
        end_ids: Sequence[int] = (),
    ):
        """Takes a model in.

        Args:
          params: f32, as `convert.weights.Branch.numbers` gives them on the mesh.
          cfg: with scan_layers off.
          mesh: its devices share batches; each text that is written takes all of them.
          context: tokens that the model sees at most, at least 2.
          tokens: of a batch on each device, padding included; a longer sequence is alone there.
          end_ids: tokens that end a text or a turn, besides the tokenizer's.
        """
        super().__init__()
        self._params, self._cfg, self._mesh, self._tokenizer = params, cfg, mesh, tokenizer
        self.max_length = context
        self._tokens = tokens
        self._stop_ids = (tokenizer.end_id, *end_ids)

    @property
    def eot_token_id(self) -> int:
        """What a text without a context follows: in training an end of text stands before every document."""
        return self._tokenizer.end_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; none are added."""
        return [int(i) for i in self._tokenizer.encode(string)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in nats."""
        texts = [instance.args[0] for instance in requests]
        found = self._loglikelihood_tokens([((t, t), [self.eot_token_id], self.tok_encode(t)) for t in texts])
        return [total for total, _ in found]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Nats of continuations, and whether all their tokens are the likeliest; requests hold ids."""
        totals = np.zeros(len(requests))
        greedy = np.ones(len(requests), bool)
        windows = [(i, *window) for i, (_, *pair) in enumerate(requests) for window in self._windows(*pair)]
        for length, batch in self._batches(windows):
            tokens_BL = np.full((self._rows(length), length + 1), self.eot_token_id, np.int32)
            for row_L, (_, tokens, _) in zip(tokens_BL, batch, strict=False):
                row_L[: len(tokens)] = tokens
            rows = place(self._mesh, len(tokens_BL), {"tokens": tokens_BL})
            with jax.set_mesh(self._mesh):
                scored = _score(self._params, rows["tokens"], self._cfg, batch_groups(self._mesh))
            nats_BL, best_BL = map(np.asarray, scored)
            for row, (i, tokens, predicted) in enumerate(batch):
                at = slice(len(tokens) - 1 - predicted, len(tokens) - 1)
                totals[i] += nats_BL[row, at].sum(dtype=np.float64)
                greedy[i] &= best_BL[row, at].all()
        return [(float(total), bool(best)) for total, best in zip(totals, greedy, strict=True)]

    def _windows(self, context: Sequence[int], continuation: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """(tokens, number predicted) that cover a continuation; the last token of a window is no input."""
        if len(continuation) <= self.max_length:
            yield [*context, *continuation][-(self.max_length + 1) :], len(continuation)
            return
        for inputs, predicted in get_rolling_token_windows(list(continuation), context[-1], self.max_length, 1):
            yield [*inputs, predicted[-1]], len(predicted)

    def _batches(self, windows: list[Window]) -> Iterator[tuple[int, list[Window]]]:
        """(padded length, windows): of few lengths, so that few programs are compiled."""
        by_length: dict[int, list[Window]] = {}
        for window in windows:
            by_length.setdefault(_padded(len(window[1]) - 1, self.max_length), []).append(window)
        for length, group in sorted(by_length.items()):
            rows = self._rows(length)
            for start in range(0, len(group), rows):
                yield length, group[start : start + rows]

    def _rows(self, length: int) -> int:
        return batch_groups(self._mesh) * max(1, self._tokens // length)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, which is left out, or the number of tokens the task asks for.

        The context is cut on the left so that it and the new tokens fit into the model's; half of that is left to it
        where a task asks for more tokens. Draws are seeded by a request's place, so that its repeats differ.
        """
        return [self._continue(seed, *instance.args) for seed, instance in enumerate(requests)]

    def _continue(self, seed: int, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        wanted = next((options[k] for k in _LENGTHS if options.get(k)), MAX_NEW_TOKENS)
        new = min(int(wanted), self.max_length - self.max_length // 2)
        prompt = (self.tok_encode(context) or [self.eot_token_id])[-(self.max_length - new) :]
        sampling = {}
        if options.get("do_sample", "temperature" in options):
            sampling = {"temperature": 1.0} | {key: options[key] for key in _SAMPLING if key in options}
        ids: list[int] = []
        text = ""
        options = {"max_tokens": new, "stop_ids": self._stop_ids, "seed": seed, **sampling}
        with jax.set_mesh(self._mesh):
            for token in generate(self._params, self._cfg, prompt, **options):
                ids.append(token)
                text = self._tokenizer.decode(ids)
                if any(stop in text for stop in stops):
                    break
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


_SAMPLING = ("temperature", "top_k", "top_p")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # as in the harness, first counts


def _padded(length: int, most: int) -> int:
    """The length that rows of `length` tokens are padded to, `most` at most."""
    padded = _SHORTEST
    while padded < length:
        padded *= 2
    return min(padded, most)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _score(params: dict[str, Any], tokens_BL: jax.Array, cfg: ModelConfig, groups: int) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each token but the first (B, L) f32, and whether it is the likeliest.

    On each device scores of the vocabulary exist for one row at a time.
    """
    hidden_BLD = transformer.forward(params, cfg, tokens_BL[:, :-1], train=False, groups=groups).hidden_BLD

    def rows(hidden_and_targets: tuple[jax.Array, jax.Array], head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(lambda row: _score_row(row[0], row[1], head_VD), hidden_and_targets)

    return over_rows(rows, (hidden_BLD, tokens_BL[:, 1:]), transformer.used_head(params, cfg))


def _score_row(hidden_LD: jax.Array, targets_L: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits_LV = transformer.score(hidden_LD, head_VD)
    nats_LV = jax.nn.log_softmax(logits_LV, axis=-1)
    chosen_L = jnp.take_along_axis(nats_LV, targets_L[:, None], axis=-1)[:, 0]
    return chosen_L, jnp.argmax(logits_LV, axis=-1) == targets_L
