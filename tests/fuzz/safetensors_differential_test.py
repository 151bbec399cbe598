#!/usr/bin/env python3
"""safetensors_differential_test.py VERDICTS: walsh's reader of safetensors beside the format's own.

Both are given the fuzzers' corpus and regressions and some thousands of files that are damaged in one or
two places. walsh may refuse what the other accepts only for the reasons listed here, and never accepts
what the other refuses.
"""

import copy
import json
import pathlib
import random
import re
import struct
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from deploy import fetched

sys.path.insert(0, fetched.find("safetensors"))
import safetensors

# What walsh refuses on purpose, by its message (worker/io/safetensors.h).
STRICTER = re.compile(
    r"header does not start with '\{'"          # white space before it
    r"|appears twice|has key '.*' twice"        # JSON's last one wins
    r"|unknown member"
    r"|dtype '.*' is not known"                 # F4, F6 and complex numbers
    r"|name has \d+ bytes, must be 1 to 256|is not printable ASCII"
    r"|more than 8 dimensions"
    r"|beyond 2\^63"                            # where another dimension is 0
    r"|size overflows 64 bits"                  # beside a dimension of 0, in whatever order
    r"|header: unexpected null$"                # "__metadata__": null
)
FILES = 5000


def with_header(header, data):
    return struct.pack("<Q", len(header)) + header + data


def nodes(value):
    yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from nodes(child)


def damage_value(rng, header):
    """Another value at one place of the header's tree."""
    parents = [node for node in nodes(header) if isinstance(node, (dict, list)) and node]
    if not parents:
        return
    parent = rng.choice(parents)
    key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    value = rng.choice([0, 1, 2, 4, 8, -1, 0.5, 2**31, 2**63, 2**64, "", "F32", "I8", "F4", None, True, [],
                        {}, [0], [0, 0], "x" * 300, copy.deepcopy(parent[key]), [1] * 9, [2**62, 4, 0], [0, 2**63 - 1]])
    if isinstance(parent, dict) and rng.random() < 0.3:
        parent[rng.choice(["a", "b", "", "dtype", "é", "__metadata__", "n" * 257])] = value
    else:
        parent[key] = value


def damage_bytes(rng, file):
    file = bytearray(file)
    at = rng.randrange(len(file))
    kind = rng.randrange(4)
    if kind == 0:
        file[at] = rng.randrange(256)
    elif kind == 1:
        file[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del file[at:at + rng.randint(1, 4)]
    else:
        file[at:at] = rng.choice([b"9", b" ", b"\0", b"{", b"}", b",", b"0", b"-"])
    return bytes(file)


def damaged(rng, seeds):
    file = rng.choice(seeds)
    length = struct.unpack("<Q", file[:8])[0]
    header, data = file[8:8 + length], file[8 + length:]
    if rng.random() < 0.6:
        tree = json.loads(header)
        for _ in range(rng.randint(1, 2)):
            damage_value(rng, tree)
        data = data if rng.random() < 0.8 else data + b"w" * rng.randint(0, 8)
        return with_header(json.dumps(tree).encode(), data)
    return damage_bytes(rng, file)


def theirs(file):
    try:
        safetensors.deserialize(file)
        return "accepted"
    except safetensors.SafetensorError as error:
        return str(error)


def ours(verdicts, files):
    stream = b"".join(struct.pack("<Q", len(file)) + file for file in files)
    done = subprocess.run([verdicts], input=stream, capture_output=True, check=True)
    return done.stdout.decode().splitlines()


def main():
    seeds = [path.read_bytes() for path in sorted((HERE / "corpus/safetensors").iterdir())]
    crashes = HERE / "regressions/safetensors"
    rng = random.Random(7)
    files = seeds + ([path.read_bytes() for path in sorted(crashes.iterdir())] if crashes.is_dir() else [])
    files += [damaged(rng, seeds) for _ in range(FILES)]
    answers = ours(sys.argv[1], files)
    assert len(answers) == len(files)
    n_both = n_stricter = 0
    unlisted = []
    for file, our in zip(files, answers):
        their = theirs(file)
        n_both += our == their == "accepted"
        if (our == "accepted") != (their == "accepted"):
            if their == "accepted" and STRICTER.search(our):
                n_stricter += 1
            else:
                unlisted.append((file, our, their))
    for file, our, their in unlisted[:20]:
        print(f"{file!r}\n  walsh: {our}\n  safetensors: {their}")
    print(f"{len(files)} files: both accept {n_both}, walsh is stricter on {n_stricter}, "
          f"{len(unlisted)} differences that are not listed")
    return 1 if unlisted or n_both < 100 else 0


if __name__ == "__main__":
    sys.exit(main())
