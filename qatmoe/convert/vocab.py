r"""A tokenizer.json as GGUF vocabulary fields and as the files of a Hugging Face folder.

llama.cpp implements pre-tokenizers by name, so a byte-level BPE is exported under the name whose regular expressions
are the tokenizer's own, found by the definition in tokenizer.json. Everything llama.cpp would silently do otherwise is
refused, but for these differences, which its own converter makes as well:

- It does not normalise. A tokenizer with NFC (Qwen, OLMo) gives other ids there for text that is not in NFC.
- "gpt-4o" is approximate there: no combining marks in words, and a letter outside A-Z and a-z is of both cases, so
  that "éÉ" is not cut.
- Added tokens that are not special are found longest first there, not leftmost first, which matters if they overlap.
- lstrip, rstrip and single_word of special tokens are ignored there.
- A byte that the vocabulary lacks (SmolLM: of some control characters) is dropped on both sides; what stood beside it
  is merged here, and not there.
- Some tokens, such as <|im_end|> and </s>, are made special there by their name, and end a generation.
- Without bos_token_id it takes 11, which it never adds, as add_bos_token is always written.
- `llama_detokenize` drops the space before punctuation with "gpt-2", "olmo" and the three names of Llama 3's pattern.
"""

import collections
import json
import types
from collections.abc import Mapping
from typing import Any

from tokenizers import models, pre_tokenizers

from qatmoe.convert.gguf import Field
from qatmoe.data.tokenizer import QWEN2_PATTERN, Tokenizer
from qatmoe.errors import UserError

Json = dict[str, Any]
Roles = Mapping[str, int]  # what a token is for -> its id
NO_ROLES: Roles = types.MappingProxyType({})

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # values of tokenizer.ggml.token_type

# The steps of a pre-tokenizer: a Split is its pattern, the others are these.
_BYTES, _WORDS, _DIGITS = "ByteLevel", "ByteLevel with use_regex", "Digits, individually"
# Patterns as the tokenizer.json files of these families have them, with the line breaks in classes as escapes.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACE
_QWEN35 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACE
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACE
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    + _SPACE
)
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# These match every character, so that to remove what does not match, as some files do, changes nothing.
_COMPLETE = (QWEN2_PATTERN, _QWEN35, _LLAMA3, _O200K)
_NAMES = {
    (QWEN2_PATTERN, _BYTES): "qwen2",
    (_QWEN35, _BYTES): "qwen35",
    (_LLAMA3, _BYTES): "llama-bpe",
    (_O200K, _BYTES): "gpt-4o",
    (r"\p{N}{1,3}", _CJK, _DEEPSEEK3, _BYTES): "deepseek-v3",
    (_WORDS,): "gpt-2",
    (_DIGITS, _WORDS): "smollm",
}
_GGUF_ROLES = {"eos": "eos", "bos": "bos", "pad": "padding", "unk": "unknown"}
# Bytes that a vocabulary may lack: those that no UTF-8 text has (GPT-NeoX), the first ones of planes 4 to 11, where no
# characters are, and control characters but for white space (SmolLM).
_SELDOM = {chr(byte) for byte in (0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100))}
_SELDOM |= {chr(0x100 + byte) for byte in range(0x20) if not 0x09 <= byte <= 0x0D}
# What pads, where a special token has this name: tokenizer.json does not say.
_PAD_NAMES = ("<|pad|>", "<|padding|>", "<pad>", "[PAD]", "<\uff5c\u2581pad\u2581\uff5c>")


def gguf_fields(tokenizer: Tokenizer, vocab_size: int, roles: Roles = NO_ROLES) -> dict[str, Field]:
    """The `tokenizer.ggml.*` fields of a model with `vocab_size` rows of embedding.

    Ids without a token are filled with unused tokens. `bos_token_id` and `padding_token_id` are there where known.

    Args:
      roles: where it is known better than tokenizer.json says, {eos, bos, pad, unk: id}.

    Raises:
      UserError: the tokenizer has more than `vocab_size` tokens, or is one that llama.cpp would run differently.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer's largest id is {tokenizer.vocab_size - 1} but model.vocab_size={vocab_size}; "
            f"set --config.model.vocab_size={tokenizer.vocab_size} or more"
        )
    parsed = json.loads(tokenizer.json)
    _check_model(parsed["model"])
    tokens, types = _tokens(parsed, vocab_size)
    before, after = _around(parsed)
    if len(before) > 1 or after:
        raise UserError(
            f"the tokenizer's post_processor puts the tokens {before} before a text and {after} after it, and "
            "llama.cpp only one before it; remove the others from post_processor in its tokenizer.json"
        )
    fields = {
        "model": Field("string", "gpt2"),
        "pre": Field("string", pre_tokenizer(tokenizer.json)),
        "tokens": Field("string", tokens),
        "token_type": Field("int32", types),
        "merges": Field("string", [" ".join(pair) for pair in _merges(parsed["model"])]),
        "add_bos_token": Field("bool", bool(before)),  # always written: without it "llama-bpe" adds one
    }
    # What llama.cpp puts before a text is its bos, whatever else has that name.
    found = all_roles(tokenizer, roles) | ({"bos": before[0]} if before else {})
    fields |= {f"{_GGUF_ROLES[role]}_token_id": Field("uint32", i) for role, i in found.items()}
    return {f"tokenizer.ggml.{key}": field for key, field in fields.items()}


def huggingface_files(tokenizer: Tokenizer, roles: Roles = NO_ROLES) -> dict[str, str]:
    """File name to text: what `transformers.AutoTokenizer` needs to give the ids of `tokenizer`.

    Unlike ours, it reads a special token that is spelled in the text as that token. `roles` as in `gguf_fields`.

    Raises:
      UserError: the tokenizer has a post-processor of an unknown type.
    """
    tokens = _ids_to_tokens(json.loads(tokenizer.json))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": tokens[i] for role, i in all_roles(tokenizer, roles).items()}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {"tokenizer.json": tokenizer.json, "tokenizer_config.json": text}


def pre_tokenizer(tokenizer_json: str) -> str:
    """llama.cpp's name of the pre-tokenizer (and normaliser) defined in a tokenizer.json.

    Raises:
      UserError: llama.cpp has none that cuts text like it.
    """
    parsed = json.loads(tokenizer_json)
    steps = tuple(_step(step) for step in _flat(parsed.get("pre_tokenizer"), "pretokenizers"))
    if steps not in _NAMES:
        raise UserError(
            f"llama.cpp does not have the tokenizer's pre-tokenizer ({', '.join(steps) or 'none'}); "
            f"use a tokenizer with that of one of {', '.join(_NAMES.values())}"
        )
    name = _NAMES[steps]
    normalizers = [step["type"] for step in _flat(parsed.get("normalizer"), "normalizers")]
    if normalizers not in ([], ["NFC"]):
        shown = ", ".join(normalizers)
        raise UserError(f"llama.cpp does not have the tokenizer's normalizer ({shown}); use one without, or with NFC")
    # A name also says whether a piece that is a token is taken as it is, without merging.
    ignore_merges = parsed["model"].get("ignore_merges", False)
    if name == "llama-bpe":
        return ("llama-bpe" if _around(parsed)[0] else "glm4") if ignore_merges else "chatglm-bpe"
    if ignore_merges and (token := _unreachable(parsed)) is not None:
        raise UserError(
            f"llama.cpp has no ignore_merges with {name!r}, and the merges do not make the token {token!r}; "
            "use a tokenizer without ignore_merges"
        )
    return "olmo" if name == "gpt-2" and normalizers else name


def _flat(step: Json | None, children: str) -> list[Json]:
    """The steps of a normaliser or pre-tokenizer: nested sequences laid out in order."""
    if step is not None and step["type"] == "Sequence":
        return [leaf for child in step[children] for leaf in _flat(child, children)]
    return [] if step is None else [step]


def _step(step: Json) -> str:
    """One step in the form of `_NAMES`; one that llama.cpp has in no pre-tokenizer stays as its JSON."""
    match step:
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            # DeepSeek's file has the line breaks themselves in its classes.
            return pattern.replace("\r", r"\r").replace("\n", r"\n")
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            if pattern in _COMPLETE:
                return pattern
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return _WORDS if step.get("use_regex", True) else _BYTES
        case {"type": "Digits", "individual_digits": True}:
            return _DIGITS
    return json.dumps(step, ensure_ascii=False)


def _check_model(model: Json) -> None:
    """Raises UserError unless it is a byte-level BPE of all common bytes without options that llama.cpp lacks."""
    options = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    problems = [f"has {option}={model[option]!r}" for option in options if model.get(option)]
    if model["type"] != "BPE":
        problems = [f"is {model['type']}"]
    elif missing := set(pre_tokenizers.ByteLevel.alphabet()) - _SELDOM - model["vocab"].keys():
        problems.append(f"lacks {len(missing)} of the 256 bytes")
    if problems:
        raise UserError(
            f"the tokenizer's model {problems[0]}; llama.cpp's is plain byte-level BPE: use such a tokenizer"
        )


def _ids_to_tokens(parsed: Json) -> dict[int, str]:
    vocab = parsed["model"]["vocab"]
    # Unigram lists [token, score] in the order of ids; the others have {token: id}.
    pairs = ((token, i) for i, (token, _) in enumerate(vocab)) if isinstance(vocab, list) else vocab.items()
    tokens = {i: token for token, i in pairs}
    return tokens | {token["id"]: token["content"] for token in parsed["added_tokens"]}


def _tokens(parsed: Json, vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of the ids below `vocab_size`. Raises UserError on what llama.cpp would find elsewhere."""
    types = {}
    for token in parsed["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        for option in ("lstrip", "rstrip", "single_word"):
            if token[option] and not token["special"]:
                name = token["content"]
                raise UserError(
                    f"the tokenizer's added token {name!r} has {option}, unknown to llama.cpp; switch it off"
                )
    tokens = _ids_to_tokens(parsed)
    texts = [tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    if len(set(texts)) < vocab_size:  # llama.cpp aborts on it
        twice = collections.Counter(texts).most_common(1)[0][0]
        raise UserError(f"two ids have the token {twice!r} in GGUF, which names unused ids so; rename the tokenizer's")
    return texts, [types.get(i, NORMAL) if i in tokens else UNUSED for i in range(vocab_size)]


def _merges(model: Json) -> list[tuple[str, str]]:
    """The merges; older tokenizer.json files have each as one string. Raises UserError on a malformed one."""
    vocab = model["vocab"]
    pairs = []
    for merge in model["merges"]:
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        if len(pair) != 2 or any(part not in vocab or " " in part for part in (*pair, "".join(pair))):
            raise UserError(f"the tokenizer's merge {merge!r} is not of two tokens that make a third; correct it")
        pairs.append(pair)
    return pairs


def _unreachable(parsed: Json) -> str | None:
    """A token that merging never gives, if there is one: only then does ignore_merges have an effect."""
    model = parsed["model"]
    bpe = models.BPE(model["vocab"], _merges(model))
    words = model["vocab"].keys() - {token["content"] for token in parsed["added_tokens"]}
    return next((word for word in sorted(words) if len(bpe.tokenize(word)) != 1), None)


def _around(parsed: Json) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and after a text; it is a template, or ByteLevel, which adds none."""
    before: list[int] = []
    after: list[int] = []
    for processor in _flat(parsed.get("post_processor"), "processors"):
        kind, side = processor["type"], before
        if kind not in ("ByteLevel", "TemplateProcessing"):
            raise UserError(f"the tokenizer's post_processor is {kind}; write it as TemplateProcessing, or remove it")
        for piece in processor.get("single", []):
            if "Sequence" in piece:
                side = after
            else:
                side.extend(processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return before, after


def all_roles(tokenizer: Tokenizer, known: Roles = NO_ROLES) -> dict[str, int]:
    """{eos, bos, pad, unk: id}: what ends a text, is put before it by the post-processor, pads it; or as known.

    Raises:
      UserError: the tokenizer has a post-processor of an unknown type.
    """
    parsed = json.loads(tokenizer.json)
    before, _ = _around(parsed)
    special = {token["content"]: token["id"] for token in parsed["added_tokens"] if token["special"]}
    pads = [special[name] for name in _PAD_NAMES if name in special]
    found = {"eos": tokenizer.end_id} | ({"bos": before[0]} if before else {}) | ({"pad": pads[0]} if pads else {})
    return found | dict(known)
