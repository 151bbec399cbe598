#!/usr/bin/env python3
"""WikiText-2's test set as GPTQ and QuaRot evaluate on it: wikitext_test_text.py wiki.test.raw > OUT

The published file has a leading blank in each row and rows of white space alone. The convention takes
the rows with their line ends, makes the white ones empty and joins all with a blank line.
"""
import hashlib
import sys

EXPECTED = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"

with open(sys.argv[1], encoding="utf-8", newline="") as file:
    rows = file.read().split("\n")
if rows[-1] == "":
    rows.pop()
text = "\n\n".join("" if row.strip() == "" else row + "\n" for row in rows).encode()
if hashlib.sha256(text).hexdigest() != EXPECTED:
    sys.exit(f"{len(text)} bytes from {len(rows)} rows are not the known text")
sys.stdout.buffer.write(text)
