"""Golden token ids, from the reference implementations.

    python -m venv VENV && VENV/bin/pip install tokenizers sentencepiece gguf
    VENV/bin/python make_tokenizer_golden.py --data TEST_DATA --smollm2 SMOLLM2.gguf

Writes texts.json (the inputs), NAME.json for each tokenizer of a model (ids by text, with and without
special tokens parsed) and synthetic.json: small tokenizers made here, each with what it gives.
"""

import argparse
import base64
import io
import json
import pathlib
import random

import gguf
import sentencepiece
from tokenizers import (AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors)

HERE = pathlib.Path(__file__).parent

HAND_WRITTEN = [
    "",
    " ",
    "  ",
    "   leading and trailing   ",
    "\t",
    "\n",
    "\r\n\r\n",
    "\n\n\n  \n\t\n",
    "a\n b\n\n  c \t d",
    "Hello, world!",
    "Hello  world   with    runs     of      spaces",
    "I'm you're he's we'll they'd I've can't",
    "I'M YOU'RE HE'S WE'LL THEY'D I'VE CAN'T",
    "it\u2019s a curly apostrophe; 'tis",
    "long s: '\u017f and kelvin '\u212a, dotless '\u0131",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x1F",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \u2460\u2461 \u00bd\u00be \u2163 \U0001d7d8\U0001d7d9",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }",
    "<html>\n  <body class=\"x\">&nbsp;</body>\n</html>",
    "https://example.org/path?query=1&x=%20#frag user@example.com",
    "snake_case CamelCase kebab-case SCREAMING_CASE x_1 __init__",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u3072\u3089\u304c\u306a\u3068\u30ab\u30bf\u30ab\u30ca\u3002",
    "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8 \uc785\ub2c8\ub2e4. \u1112\u1161\u11ab\u1100\u1173\u11af",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u0643\u064e\u062a\u064e\u0628\u064e",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u043b\u043a\u0430 \u0438\u0306 \u0415\u0308",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0915\u093c \u0958",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 \u03ba\u03cc\u03c3\u03bc\u03b5 \u03ac \u1f71 \u03b1\u0301",
    "caf\u00e9 cafe\u0301 na\u00efve nai\u0308ve \u00c5ngstr\u00f6m \u212bngstrom A\u030angstro\u0308m",
    "q\u0323\u0307 q\u0307\u0323 s\u0323\u0307 s\u0307\u0323 \u1e69 \u1e0b\u0323 d\u0323\u0307",
    "zalgo: h\u0335\u0321\u0300\u0301\u0316e\u0337\u0322\u0312\u0317l\u0338\u0301\u0300\u0328\u0315",
    "\u2126 \u03a9 \u212b \u00c5 \uf900 \u8c48 \ufb01 \ufb03 \u00b2 \u2460 \u3392",
    "\U0001f600 \U0001f680\U0001f680 \U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "non\u00a0breaking\u00a0\u00a0space \u00a0 mixed \u00a0",
    "\u3000ideographic\u3000space\u3000\u3000",
    "em\u2003space thin\u2009space hair\u200aspace zero\u200bwidth narrow\u202fnbsp \u205fmath",
    "line\u2028separator paragraph\u2029separator next\u0085line form\ffeed vertical\vtab",
    "mongolian\u180evowel \u180e separator \u180e\u180e x \u180ey",
    "soft\u00adhyphen bom\ufeff word\u2060joiner \u200dzwj \u200czwnj",
    "control \x01\x02\x1b[0m \x7f \x80\x9f \x1c\x1d\x1e\x1f end",
    "nul \x00 inside",
    "replacement \ufffd private \ue000 \U000f0000 noncharacter \uffff \U0010ffff",
    "\u2581 lower one eighth block \u2581\u2581 in text \u2581",
    "\u0120 G with dot \u010a C with dot",
    "a" * 64,
    "ab" * 50,
    "=" * 80,
    "-" * 33 + "\n" + "*" * 17,
    "." * 7 + "!" * 5 + "?" * 9,
    " " * 40 + "x" + " " * 41,
    "\t" * 9 + "x" + "\n" * 12,
    " \n" * 10 + "\n " * 10,
    "!!! ??? ... --- *** ((( ))) [[[ ]]] {{{ }}}",
    "$100 \u20ac200 \u00a3300 \u00a5400 50% \u2030 \u00b0C \u00b1 \u00d7 \u00f7 \u2211\u222b\u221a\u2260\u2264",
    "\\begin{equation} E = mc^2 \\end{equation} $x_i^2$",
    "SELECT * FROM t WHERE a='b' AND c>=10;",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"a\": \"b\\n\"}}",
    "Once upon a time, there was a little girl named Lily. She loved to play outside.",
    "'s't're've'm'll'd",
    "x's  'S 'T 'Re 'VE'M'Ll'D",
    "\u00e9\u00c9\u00df\u1e9e \u0130I\u0131i \u01c5 \u02b0 \u00aa\u00ba \u1d2c",
    "\u0300starts with a mark", "a \u0301 b", "1\u0301 2\u20e3 #\ufe0f\u20e3",
    "<|endoftext|>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "text <|im_start|> spaced <|im_end|> text",
    "<|start_story|>Once<|end_story|> <|start_story|> x<unk>y <unk> z",
    "<s>[INST] hi [/INST] ok </s><s> x</s>",
    "<think>\nhm\n</think>\n\nyes <tool_call>{}</tool_call>",
    "<|im_start", "<|im_start|", "<|<|im_end|>|>", "<|im_end|><|im_end|>",
    "<0x0A> <0xFF> <0x41>",
]


def mixed_lines(seed: int, count: int) -> list[str]:
    """Random lines over many scripts, so that the borders between classes are met."""
    rng = random.Random(seed)
    ranges = [(0x20, 0x7E)] * 6 + [
        (0x09, 0x0D), (0x80, 0xFF), (0x100, 0x17F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF),
        (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF),
        (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x2100, 0x214F), (0x2460, 0x24FF), (0x3000, 0x30FF),
        (0x4E00, 0x4FFF), (0xAC00, 0xAFFF), (0xF900, 0xFA6D), (0x1D400, 0x1D7CB), (0x1F300, 0x1F64F),
    ]
    words = ["the", " and", " of", "ing", " 123", "'s", "'LL", "  ", "\n", " \u00a0", "\u200d", "Th", "é"]
    lines = []
    for _ in range(count):
        line = ""
        for _ in range(rng.randrange(1, 14)):
            if rng.random() < 0.4:
                line += rng.choice(words)
                continue
            low, high = rng.choice(ranges)
            for _ in range(rng.randrange(1, 4)):
                c = chr(rng.randint(low, high))
                line += c
        lines.append(line)
    return lines


def smollm(path: str) -> Tokenizer:
    """The tokenizer of SmolLM2, rebuilt from the vocabulary inside its GGUF."""
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types) if kind == 3])
    return tokenizer


def tokenizer_golden(tokenizer: Tokenizer, texts: list[str]) -> dict:
    """`ids`: special tokens in the text count; `plain`: where they do not and that differs."""
    ids = [tokenizer.encode(t).ids for t in texts]
    tokenizer.encode_special_tokens = True
    plain = [tokenizer.encode(t).ids for t in texts]
    return {"ids": ids, "plain": {i: p for i, p in enumerate(plain) if p != ids[i]}}


def sentencepiece_golden(path: str, texts: list[str]) -> dict:
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    return {"ids": [[processor.bos_id()] + processor.encode(t) for t in texts]}


SYNTHETIC_TEXTS = [
    "", " ", "  ", "ab", " ab", "ab ab", "a  b", "abc cab", "a<x>b", "a <x> b", "<x>", " <x>  <x> ", "a<y>b a <y> b",
    "<y>a", "_<y>", "<y>.", "a<z>b", "a  <z>  b", "<z> <z>", "<w> a <w>", "ab<w>ab", "\u00e9<x>\u00e9", "a\u00e9\u4e16b", "\u4e16\u754c",
    "a\u2581b", "\u2581a", "12 345 a6", "a\n b\t<x>\nb", "<pad>a<pad>", "<s>a</s>", "ba" * 9, "\u00a0<z>\u3000b", "<x><y><z>",
]


def synthetic_tokenizers() -> dict[str, Tokenizer]:
    """Each option of the format at least once, on a vocabulary of a few letters."""
    words = ["<unk>", "<s>", "</s>", "a", "b", "c", "\u2581", "1", "2", "3", "<", "x", ">", "ab", "\u2581a", "\u2581ab", "ba",
             "bab", "b\u2581", "a\u2581", "<0xC3>", "<0xA9>"]
    merges = [("a", "b"), ("\u2581", "a"), ("\u2581", "ab"), ("\u2581a", "b"), ("b", "a"), ("ba", "b"), ("b", "\u2581"),
              ("a", "\u2581")]
    vocab = {w: i for i, w in enumerate(words)}
    other_bytes = [f"<0x{b:02X}>" for b in range(256) if b not in (0xC3, 0xA9)]
    all_bytes = {token: len(words) + i for i, token in enumerate(other_bytes)}

    def make(vocabulary=None, **options) -> Tokenizer:
        return Tokenizer(models.BPE(vocabulary or vocab, merges, **options))

    def add(tokenizer: Tokenizer) -> Tokenizer:
        tokenizer.add_tokens([AddedToken("<x>", normalized=False), AddedToken("<y>", single_word=True, normalized=False),
                              AddedToken("<z>", lstrip=True, rstrip=True, normalized=False),
                              AddedToken("<w>", normalized=True)])
        tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>", "<pad>")])
        return tokenizer

    metaspace_decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    out = {}
    for scheme in ("always", "first", "never"):
        for split in (True, False):
            tokenizer = add(make(unk_token="<unk>", fuse_unk=split))
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
            tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
            out[f"metaspace {scheme} {split}"] = tokenizer
    for name, options in {
        "unknown alone": {"unk_token": "<unk>"}, "unknown fused": {"unk_token": "<unk>", "fuse_unk": True}, "unknown lost": {},
        "bytes, some": {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True},
        "bytes, all": {"unk_token": "<unk>", "byte_fallback": True, "vocabulary": vocab | all_bytes},
        "ignore merges": {"unk_token": "<unk>", "ignore_merges": True},
    }.items():
        tokenizer = add(make(**options))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = metaspace_decoder
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        out[name] = tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_vocab = {w: i for i, w in enumerate(["<s>", "</s>"] + alphabet + ["ab", "\u0120a", "\u0120ab", "12"])}
    byte_merges = [("a", "b"), ("\u0120", "a"), ("\u0120", "ab"), ("\u0120a", "b"), ("1", "2")]
    for name, stages, prefix in (
        ("byte level, prefix", [pre_tokenizers.ByteLevel(add_prefix_space=True)], True),
        ("byte level, digit runs", [pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
        ("byte level, no pattern", [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], False),
    ):
        tokenizer = add(Tokenizer(models.BPE(bytes_vocab, byte_merges)))
        tokenizer.pre_tokenizer = stages[0] if prefix else pre_tokenizers.Sequence(stages)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])])
        out[name] = tokenizer
    return out


def synthetic_golden() -> dict:
    golden = {"texts": SYNTHETIC_TEXTS, "tokenizers": []}
    for name, tokenizer in synthetic_tokenizers().items():
        entry = {"name": name, "json": json.loads(tokenizer.to_str()), **tokenizer_golden(tokenizer, SYNTHETIC_TEXTS)}
        entry["decoded"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in entry["ids"]]
        golden["tokenizers"].append(entry)
    return golden


def trained_sentencepiece() -> dict:
    """A model with what Llama 2's does not have: user-defined pieces, no dummy prefix, unknown characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab abc abcd  bcd <sep>cab", "dab a  bad", "\u00e9ab d\u00e9"] * 9), model_writer=model,
        model_type="bpe", vocab_size=40, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, user_defined_symbols=["<sep>", "\u2581\u2581", "ab c"], control_symbols=["<ctl>"],
        hard_vocab_limit=False, character_coverage=1.0)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    texts = SYNTHETIC_TEXTS + ["abcd ab cab<sep>dab", "a  b   c    d", "\u4e16\u754c<sep>\u4e16", "<ctl>ab", "ab cab c"]
    return {"model": base64.b64encode(model.getvalue()).decode(), "texts": texts,
            "ids": [processor.encode(t) for t in texts]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--smollm2", required=True)
    args = parser.parse_args()
    texts = HAND_WRITTEN + mixed_lines(seed=20240, count=130)

    def write(name: str, value) -> None:
        text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
        (HERE / f"{name}.json").write_text(text + "\n")

    def from_file(name: str) -> Tokenizer:
        return Tokenizer.from_file(str(args.data / name / "tokenizer.json"))

    write("texts", texts)
    write("smollm", tokenizer_golden(smollm(args.smollm2), texts))
    write("llama3", tokenizer_golden(from_file("tokenizers/llama3"), texts))
    write("qwen3", tokenizer_golden(from_file("tokenizers/qwen3"), texts))
    write("tinystories", tokenizer_golden(from_file("models/TinyStories-656K"), texts))
    write("synthetic", synthetic_golden() | {"sentencepiece": trained_sentencepiece()})
    write("llama2", sentencepiece_golden(str(args.data / "tokenizers/llama2/tokenizer.model"), texts))


if __name__ == "__main__":
    main()
