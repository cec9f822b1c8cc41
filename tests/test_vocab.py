"""Vocabularies for llama.cpp and Hugging Face: the fields, the refusals, and llama.cpp's ids equal to ours."""

import ctypes
import json
import random
import unicodedata

import gguf
import llama_cpp
import pytest
import tokenizers
from llama_cpp import _logger
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qatmoe.convert import vocab
from qatmoe.data import tokenizer
from qatmoe.data.tokenizer import END_OF_TEXT, QWEN2_PATTERN, Tokenizer
from qatmoe.errors import UserError

_logger.set_verbose(False)

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def cut(*patterns):
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, BYTES])


# Written out as in the families' tokenizer.json files, apart from the module's own.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# With the line breaks themselves in the classes.
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
NFC = normalizers.NFC()

# Name in llama.cpp: pre-tokenizer, normaliser, ignore_merges, whether a beginning-of-text token is added.
DEFINITIONS = {
    "qwen2": (cut(QWEN2_PATTERN), NFC, False, False),
    "qwen35": (cut(QWEN35), NFC, False, False),
    "llama-bpe": (cut(LLAMA3), None, True, True),
    "glm4": (cut(LLAMA3), None, True, False),
    "chatglm-bpe": (cut(LLAMA3), None, False, False),
    "gpt-4o": (cut(O200K), None, False, False),
    "deepseek-v3": (
        cut(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3),
        normalizers.Sequence([]),
        False,
        True,
    ),
    "gpt-2": (WORDS, None, False, False),
    "olmo": (WORDS, NFC, False, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]), None, False, False),
}

ATOMS = (
    """a Z 's 'S 'll 'LL don't I'VE 1 12 1234567 ² ½ ٣ Ⅷ é É HÉLÈNE École 日本語 カタカナ ひらがな 한국어 🚀 🇩🇪
... ! — « $ + _ / // \\ { } (x) # ſ K ß ǅ ʰ ªº สวัสดี नमस्ते العربية שלום Привет ΑΒγ foo_bar CamelCase HTTPServer
' ’s <|endoftext|> <|im_end|> 𝐀 ⓐ 𝟘 〇 ㊀ def return""".split()
    + [
        *(" ", "  ", "     ", "\t", "\n", "\r\n", "\r", "\n\n", " \n", "\xa0", "\u3000", "\u200b", "\u200d", "\u0301"),
        *(
            "e\u0301",
            "\u0900",
            "\u0345",
            "👨\u200d👩\u200d👧",
            "\x00",
            "\x01",
            "\x7f",
            "\ufeff",
            "\U0010ffff",
            "\ue000",
        ),
        *("\x0b", "\x0c", "\x85", "\u2028", "\u1680"),
    ]
)
CODE = 'def f(x: int):\n    """Doc."""\n\n\tif x >= 10_000:\r\n        return {"a": [x**2, -1.5e-3]}  # it\'s\n\n\n'


def texts(name):
    """Nasty texts, less what the module says llama.cpp treats differently."""
    atoms = ATOMS
    if name == "gpt-4o":  # no combining marks, and no case but in ASCII
        atoms = [atom for atom in ATOMS if not any(odd_case(char) for char in atom)]
    rng = random.Random(0)
    drawn = ["".join(rng.choices(atoms, k=rng.choice([2, 3, 4, 12]))) for _ in range(1500)]
    fixed = [CODE, "École Привет Ελλάδα I'm WE'RE", " " * 100 + "x" + "\n" * 50 + "\t \n \n\n  ", "1" * 50, ""]
    result = [*atoms, *drawn, *fixed]
    # llama.cpp does not normalise.
    return [unicodedata.normalize("NFC", text) for text in result] if DEFINITIONS[name][1] is NFC else result


def odd_case(char):
    return unicodedata.category(char)[0] == "M" or (not char.isascii() and unicodedata.category(char)[:2] in CASED)


CASED = ("Lu", "Ll", "Lt")


@pytest.fixture(scope="module")
def learned():
    """A vocabulary learned without cutting the text: its merges cross every boundary, so a wrong cut shows."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = BYTES
    rng = random.Random(1)
    lines = ["".join(rng.choices(ATOMS, k=8)) for _ in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        max_token_length=12,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    return json.loads(backend.to_str())


def build(model, name="qwen2", added=()):
    """The learned model with another definition around it."""
    cutter, normalizer, ignore_merges, begins = DEFINITIONS[name]
    backend = tokenizers.Tokenizer.from_str(json.dumps(model))
    backend.model.ignore_merges = ignore_merges
    backend.pre_tokenizer, backend.decoder = cutter, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens([token for token in added if not token.special])
    backend.add_special_tokens([token for token in added if token.special])
    if begins:
        backend.add_special_tokens(["<|begin|>"])
        first = ("<|begin|>", backend.token_to_id("<|begin|>"))
        template = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A <|begin|> $B", [first])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return Tokenizer(backend)


def altered(built, **changes):
    """The tokenizer with parts of its tokenizer.json replaced, whether the library would take it or not."""
    built.json = json.dumps(json.loads(built.json) | changes)
    return built


def altered_model(built, **changes):
    return altered(built, model=json.loads(built.json)["model"] | changes)


@pytest.fixture
def llama(tmp_path):
    """Writes the fields of a tokenizer to a GGUF file and opens its vocabulary in llama.cpp."""
    opened = []

    def open_vocab(fields):
        writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "qwen3moe")
        for key, (kind, value) in fields.items():
            item = gguf.GGUFValueType[kind.upper()]
            if isinstance(value, list):
                writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=item)
            else:
                writer.add_key_value(key, value, item)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(tmp_path / "vocab.gguf").encode(), params)
        assert model
        opened.append(model)
        return llama_cpp.llama_model_get_vocab(model)

    llama_cpp.llama_backend_init()
    yield open_vocab
    for model in opened:
        llama_cpp.llama_model_free(model)


def llama_ids(opened, text, add_special=False, parse_special=False):
    data = text.encode()
    ids = (llama_cpp.llama_token * (len(data) + 2))()
    count = llama_cpp.llama_tokenize(opened, data, len(data), ids, len(ids), add_special, parse_special)
    assert count >= 0
    return list(ids[:count])


def llama_text(opened, token):
    buffer = ctypes.create_string_buffer(64)
    length = llama_cpp.llama_token_to_piece(opened, token, buffer, 64, 0, True)
    assert length >= 0
    return buffer.raw[:length]


# llama.cpp.


@pytest.mark.parametrize("name", DEFINITIONS)
def test_llama_cpp_gives_our_ids(learned, llama, name):
    built = build(learned, name, [AddedToken("<think>", special=False), AddedToken("<|im_end|>", special=True)])
    fields = vocab.gguf_fields(built, built.vocab_size + 3)
    assert fields["tokenizer.ggml.pre"] == ("string", name)
    opened = llama(fields)
    assert llama_cpp.llama_vocab_n_tokens(opened) == built.vocab_size + 3
    assert llama_cpp.llama_vocab_eos(opened) == built.end_id
    assert llama_cpp.llama_vocab_get_add_bos(opened) == DEFINITIONS[name][3]
    cases = [*texts(name), "a<think>b <think>", f"a{END_OF_TEXT}<|im_end|>"]
    wrong = [text for text in cases if llama_ids(opened, text) != built.encode(text).tolist()]
    assert wrong == []
    # As a chat has it: special tokens are tokens, and the text begins as the tokenizer has it begin.
    whole = tokenizers.Tokenizer.from_str(built.json)
    for text in ("", "one", f"a{END_OF_TEXT}<|im_end|>b"):
        assert llama_ids(opened, text, add_special=True, parse_special=True) == whole.encode(text).ids
    for token in {built.end_id, *built.encode("日本語 def<think>").tolist()}:
        assert llama_text(opened, token).decode(errors="replace") == built.decode([token])
    assert llama_text(opened, built.vocab_size) == b""  # an unused id


@pytest.mark.parametrize("name", ["llama-bpe", "glm4", "chatglm-bpe"])
def test_llama_cpp_ignores_merges_where_we_do(learned, llama, name):
    model = learned | {"model": learned["model"] | {"vocab": learned["model"]["vocab"] | {"zqzq": 2500}}}
    built = build(model, name)
    assert (2500 in built.encode("zqzq")) == DEFINITIONS[name][2]
    opened = llama(vocab.gguf_fields(built, built.vocab_size))
    assert llama_ids(opened, "zqzq zqzq") == built.encode("zqzq zqzq").tolist()


def test_llama_cpp_reads_the_bundled_tokenizer(llama):
    ours = tokenizer.load("default")
    opened = llama(vocab.gguf_fields(ours, ours.vocab_size))
    for text in [*ATOMS, *ATOMS[::-1], CODE]:
        assert llama_ids(opened, text) == ours.encode(text).tolist()


@pytest.mark.parametrize(
    ("name", "text"), [("qwen2", "e\u0301"), ("olmo", "e\u0301"), ("gpt-4o", "e\u0301"), ("gpt-4o", "éÉ" * 4)]
)
def test_the_documented_differences_are_there(llama, learned, name, text):
    """So that the module's list is revised when llama.cpp is."""
    # With every merge of these texts, a piece is one token.
    built = build(with_merges(learned, [text, unicodedata.normalize("NFC", text)]), name)
    opened = llama(vocab.gguf_fields(built, built.vocab_size))
    assert llama_ids(opened, text) != built.encode(text).tolist()


def with_merges(model, words):
    """The model with merges that make each word one token, if nothing cuts it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = BYTES
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(words * 2, trainer)
    return model | {"model": json.loads(backend.to_str())["model"]}


# Fields.


def test_fields(learned):
    added = [AddedToken("<think>", special=False), AddedToken("<|padding|>", special=True)]
    built = build(learned, "llama-bpe", added)
    parsed = json.loads(built.json)
    size = built.vocab_size
    fields = vocab.gguf_fields(built, size + 2)
    assert {key.removeprefix("tokenizer.ggml."): field for key, field in fields.items() if not_a_list(field)} == {
        "model": ("string", "gpt2"),
        "pre": ("string", "llama-bpe"),
        "eos_token_id": ("uint32", built.end_id),
        "bos_token_id": ("uint32", size - 1),
        "padding_token_id": ("uint32", size - 2),
        "add_bos_token": ("bool", True),
    }
    kind, tokens = fields["tokenizer.ggml.tokens"]
    assert kind == "string" and len(tokens) == size + 2
    assert all(tokens[i] == token for token, i in parsed["model"]["vocab"].items())
    assert tokens[size - 3 :] == ["<think>", "<|padding|>", "<|begin|>", f"[PAD{size}]", f"[PAD{size + 1}]"]
    kind, types = fields["tokenizer.ggml.token_type"]
    assert kind == "int32" and types[0] == 3  # the end of text
    assert types[1 : size - 3] == [1] * (size - 4)
    assert types[size - 3 :] == [4, 3, 3, 5, 5]
    kind, merges = fields["tokenizer.ggml.merges"]
    assert kind == "string" and merges == [" ".join(pair) for pair in parsed["model"]["merges"]]


def not_a_list(field):
    return not isinstance(field.value, list)


def test_an_unknown_beginning_and_padding_are_left_out():
    fields = vocab.gguf_fields(tokenizer.load("default"), 5000)
    assert fields["tokenizer.ggml.add_bos_token"] == ("bool", False)
    assert "tokenizer.ggml.bos_token_id" not in fields and "tokenizer.ggml.padding_token_id" not in fields


def test_merges_as_strings_and_gaps_between_ids(learned):
    built = build(learned)
    pairs = json.loads(built.json)["model"]["merges"]
    expected = vocab.gguf_fields(built, built.vocab_size)
    assert vocab.gguf_fields(altered_model(built, merges=[" ".join(p) for p in pairs]), built.vocab_size) == expected
    token = json.loads(built.json)["added_tokens"][0]
    far = {"id": built.vocab_size + 1, "content": "<far>", "special": True}
    built.vocab_size += 2
    tokens = vocab.gguf_fields(altered(built, added_tokens=[token, token | far]), built.vocab_size)
    assert tokens["tokenizer.ggml.tokens"].value[-2:] == [f"[PAD{built.vocab_size - 2}]", "<far>"]
    assert tokens["tokenizer.ggml.token_type"].value[-2:] == [5, 3]


# Recognition.


def test_the_ways_to_write_the_same_pre_tokenizer(learned):
    removed = pre_tokenizers.Split(Regex(O200K), behavior="removed", invert=True)
    nested = pre_tokenizers.Sequence([pre_tokenizers.Sequence([removed]), BYTES])
    for cutter, normalizer, name in [
        (nested, None, "gpt-4o"),
        (pre_tokenizers.Sequence([WORDS]), None, "gpt-2"),
        (cut(QWEN2_PATTERN), None, "qwen2"),
        (cut(QWEN2_PATTERN), normalizers.Sequence([NFC]), "qwen2"),
    ]:
        backend = tokenizers.Tokenizer.from_str(json.dumps(learned))
        backend.pre_tokenizer = cutter
        if normalizer is not None:
            backend.normalizer = normalizer
        assert vocab.pre_tokenizer(backend.to_str()) == name


def test_ignore_merges_without_effect_is_accepted(learned):
    """As in files converted from tiktoken, whose merges make every token."""
    built = build(learned, "gpt-4o")
    assert vocab.pre_tokenizer(altered_model(built, ignore_merges=True).json) == "gpt-4o"
    model = json.loads(built.json)["model"]
    model["vocab"]["zqzq"] = 9999
    with pytest.raises(UserError, match="no ignore_merges with 'gpt-4o'.*'zqzq'.*use a tokenizer without"):
        vocab.pre_tokenizer(altered(built, model=model).json)


@pytest.mark.parametrize(
    ("cutter", "shown"),
    [
        (None, "none"),
        (BYTES, "(ByteLevel)"),
        (cut(r"\p{L}+|\n"), r"(\p{L}+|\n, ByteLevel)"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), '"add_prefix_space": true'),
        (pre_tokenizers.Metaspace(), "Metaspace"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(), WORDS]), '"individual_digits": false'),
        (pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="merged_with_next"), "MergedWithNext"),
        # Drops what it does not match.
        (pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="removed", invert=True), '"Removed"'),
    ],
)
def test_other_pre_tokenizers_are_refused(learned, cutter, shown):
    backend = tokenizers.Tokenizer.from_str(json.dumps(learned))
    backend.pre_tokenizer = cutter
    with pytest.raises(UserError, match="does not have the tokenizer's pre-tokenizer") as caught:
        vocab.pre_tokenizer(backend.to_str())
    assert shown in str(caught.value) and "use a tokenizer with that of one of qwen2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_normalizers_are_refused(learned):
    for normalizer in (normalizers.NFKC(), normalizers.Sequence([NFC, normalizers.Lowercase()])):
        backend = tokenizers.Tokenizer.from_str(build(learned).json)
        backend.normalizer = normalizer
        with pytest.raises(UserError, match="normalizer .*(NFKC|NFC, Lowercase).*use one without, or with NFC"):
            vocab.pre_tokenizer(backend.to_str())


# Refusals.


def refused(built, message, vocab_size=None):
    with pytest.raises(UserError, match=message) as caught:
        vocab.gguf_fields(built, vocab_size or built.vocab_size)
    assert "\n" not in str(caught.value)


def test_more_tokens_than_the_model_has(learned):
    built = build(learned)
    message = "largest id is 2499 but model.vocab_size=2499; set --config.model.vocab_size=2500 or more"
    refused(built, message, vocab_size=2499)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Unigram"}, "model is Unigram.*plain byte-level BPE: use such"),
        ({"byte_fallback": True}, "has byte_fallback=True"),
        ({"continuing_subword_prefix": "##"}, "has continuing_subword_prefix='##'"),
        ({"end_of_word_suffix": "</w>"}, "has end_of_word_suffix='</w>'"),
        ({"dropout": 0.1}, "has dropout=0.1"),
        ({"vocab": {"a": 0, "b": 1}, "merges": []}, "lacks 212 of the 256 bytes"),
        ({"merges": [["a", "b", "c"]]}, r"merge \['a', 'b', 'c'\].*correct it"),
        ({"merges": ["ab"]}, "merge 'ab'"),
        ({"merges": [["a", "\u2581"]]}, "merge .*'\u2581'"),
    ],
)
def test_other_models_and_malformed_merges(learned, change, message):
    refused(altered_model(build(learned), **change), message)


def test_bytes_that_no_text_has_may_be_missing(learned):
    built = build(learned)
    model = json.loads(built.json)["model"]
    kept = {token: i for token, i in model["vocab"].items() if token not in ("\xc0", "\xc1", "\xff")}
    fields = vocab.gguf_fields(altered_model(built, vocab=kept), built.vocab_size)
    assert fields["tokenizer.ggml.token_type"].value.count(5) == 3


def test_control_characters_and_planes_without_any_may_be_missing(learned, llama):
    """As in SmolLM's vocabulary. Both drop them; tokenizers alone merge across what was dropped."""
    built = build(with_merges(learned, [".."]), "smollm")
    model = json.loads(built.json)["model"]
    gone = [chr(0x100 + byte) for byte in (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D)] + ["\xc0", "\xf1", "\xf2", "\xff"]
    kept = {token: i for token, i in model["vocab"].items() if token not in gone}
    built = Tokenizer(tokenizers.Tokenizer.from_str(altered_model(built, vocab=kept).json))
    opened = llama(vocab.gguf_fields(built, built.vocab_size))
    for text in [*ATOMS, CODE, "a\x04b", "\x1d", "x \x06\x14 1", "one\U00040001two", "end.\x13"]:
        assert llama_ids(opened, text) == built.encode(text).tolist()
    assert built.encode("a\x04b").tolist() == built.encode("ab").tolist()
    assert len(llama_ids(opened, ".\x04.")) == 2 and len(built.encode(".\x04.")) == 1
    refused(altered_model(built, vocab={token: i for token, i in kept.items() if token != "Ċ"}), "lacks 1 of the 256")


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_llama_cpp_finds_elsewhere(learned, option):
    refused(build(learned, added=[AddedToken("<x>", special=False, **{option: True})]), f"'<x>' has {option}")
    built = build(learned, added=[AddedToken("<x>", special=True, **{option: True})])
    assert vocab.gguf_fields(built, built.vocab_size)["tokenizer.ggml.token_type"].value[-1] == 3


def test_a_token_named_as_an_unused_one(learned):
    """llama.cpp aborts the process on it."""
    built = build(learned, added=[AddedToken("[PAD2501]", special=True)])
    refused(built, r"two ids have the token '\[PAD2501\]'", vocab_size=2502)


def test_tokens_around_a_text(learned):
    built = build(learned)
    template = processors.TemplateProcessing("$A <|endoftext|>", None, [(END_OF_TEXT, built.end_id)])
    backend = tokenizers.Tokenizer.from_str(built.json)
    backend.post_processor = template
    message = r"puts the tokens \[\] before a text and \[0\] after it.*remove the others from post_processor"
    refused(Tokenizer(backend), message)
    backend.post_processor = processors.BertProcessing((END_OF_TEXT, 0), (END_OF_TEXT, 0))
    refused(Tokenizer(backend), "post_processor is BertProcessing; write it as TemplateProcessing, or remove it")


def test_what_is_put_before_a_text_is_ggufs_bos(learned):
    """Whatever else tokenizer_config.json calls so; Hugging Face is told what that says."""
    built = build(learned, "llama-bpe", [AddedToken("<other>", special=True)])
    begin, other = built.id_of("<|begin|>"), built.id_of("<other>")
    assert vocab.gguf_fields(built, built.vocab_size, {"bos": other})["tokenizer.ggml.bos_token_id"].value == begin
    config = json.loads(vocab.huggingface_files(built, {"bos": other})["tokenizer_config.json"])
    assert config["bos_token"] == "<other>"


# Hugging Face.


def test_a_unigram_model_goes_to_huggingface_alone():
    """Its vocabulary is a list, of which the ids are the places."""
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -2.0)], 0))
    built = Tokenizer(backend)
    config = json.loads(vocab.huggingface_files(built, {"unk": 0, "bos": 3})["tokenizer_config.json"])
    assert (config["eos_token"], config["unk_token"], config["bos_token"]) == ("</s>", "<unk>", "b")
    refused(built, "model is Unigram.*plain byte-level BPE: use such")


@pytest.mark.parametrize("name", DEFINITIONS)
def test_huggingface_files(learned, name):
    built = build(learned, name, [AddedToken("<pad>", special=True)])
    files = vocab.huggingface_files(built)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    backend.encode_special_tokens = True
    for text in ATOMS:
        assert backend.encode(text, add_special_tokens=False).ids == built.encode(text).tolist()
    begins = {"bos_token": "<|begin|>"} if DEFINITIONS[name][3] else {}
    assert json.loads(files["tokenizer_config.json"]) == begins | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
