#!/usr/bin/env python3
"""Checks that tokenizer.json files made by worker/io/tokenizer_json_writer.cc encode as their source does.

    pip install tokenizers sentencepiece regex gguf
    check_tokenizer_json.py gpt-2  tokenizer.json VECTORS         (…/ggml-vocab-gpt-2.gguf.inp and .out)
    check_tokenizer_json.py spm    tokenizer.json MODEL TEXT      (SentencePiece model, text file)
    check_tokenizer_json.py smollm tokenizer.json GGUF TEXT

The references are llama.cpp's vectors, the sentencepiece package, and for smollm a plain merge loop over
the GGUF's own vocabulary, written here.
"""

import json
import pathlib
import sys

import regex
from tokenizers import Tokenizer


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def pieces_of(path):
    """Paragraphs, lines and odd stretches of a text file."""
    text = pathlib.Path(path).read_text()
    lines = text.split("\n")
    samples = lines[:4000] + [text[i:i + 777] for i in range(0, min(len(text), 300000), 777)]
    return samples + ["", " ", "  a  b", "1234567 89", "tab\there", "naïve café 日本語 🙂", "\n\n x\n", "don't I'LL"]


def check_vectors(tokenizer, prefix):
    cases = pathlib.Path(prefix + ".inp").read_text().split("\n__ggml_vocab_test__\n")
    expected = pathlib.Path(prefix + ".out").read_text().split("\n")
    n = 0
    for text, line in zip(cases, expected):
        assert encode(tokenizer, text) == [int(x) for x in line.split()], repr(text)
        n += 1
    return n


def check_sentencepiece(tokenizer, model, text):
    import sentencepiece
    reference = sentencepiece.SentencePieceProcessor(model_file=model)
    n = 0
    for sample in pieces_of(text):
        if not sample:
            continue  # Prepend gives "▁" for nothing in some versions of tokenizers
        assert encode(tokenizer, sample) == reference.encode(sample), repr(sample)
        n += 1
    return n


def gguf_reference(path):
    from gguf import GGUFReader
    reader = GGUFReader(path)

    def strings(key):
        field = reader.fields[key]
        return [bytes(field.parts[i]).decode() for i in field.data]

    ids = {token: i for i, token in enumerate(strings("tokenizer.ggml.tokens"))}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(strings("tokenizer.ggml.merges"))}
    keep = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    rest = [b for b in range(256) if b not in keep]
    symbol = {b: chr(b) for b in keep} | {b: chr(256 + i) for i, b in enumerate(rest)}
    gpt2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def run(text):
        out = []
        for stretch in regex.findall(r"\p{N}|[^\p{N}]+", text):
            for word in gpt2.findall(stretch):
                parts = [symbol[b] for b in word.encode()]
                while len(parts) > 1:
                    rank, at = min((ranks.get((a, b), 1 << 30), i)
                                   for i, (a, b) in enumerate(zip(parts, parts[1:])))
                    if rank == 1 << 30:
                        break
                    parts[at:at + 2] = [parts[at] + parts[at + 1]]
                out += [ids[p] for p in parts]
        return out

    return run


def main():
    kind, path, *rest = sys.argv[1:]
    tokenizer = Tokenizer.from_file(path)
    ids = json.loads(pathlib.Path(path).read_text())["model"]["vocab"]
    assert sorted(ids.values()) == list(range(len(ids)))
    if kind == "gpt-2":
        n = check_vectors(tokenizer, *rest)
    elif kind == "spm":
        n = check_sentencepiece(tokenizer, *rest)
    else:
        reference = gguf_reference(rest[0])
        samples = pieces_of(rest[1])[:6000]
        n = len(samples)
        for sample in samples:
            assert encode(tokenizer, sample) == reference(sample), repr(sample)
            assert tokenizer.decode(encode(tokenizer, sample)) == sample, repr(sample)
    print(f"{kind}: {n} texts encode alike")


if __name__ == "__main__":
    main()
