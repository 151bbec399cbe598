"""Golden ids of SentencePiece vocabularies with unused pieces, from the reference implementation.

    python -m venv VENV && VENV/bin/pip install sentencepiece==0.2.0 protobuf
    VENV/bin/python make_unused_pieces.py

unused_pieces.json: small models of the BPE kind (their .model files in base64), in which normal pieces
are put together from unused ones, and texts with their ids. Version 0.2.3 gives the unknown piece for an
unused single character, which cannot be taken apart; 0.2.0 and those before it, with which the models at
hand were made, give its own id.
"""

import base64
import json
import pathlib
import random

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as pb

HERE = pathlib.Path(__file__).parent
NORMAL, UNKNOWN, CONTROL, UNUSED = 1, 2, 3, 5


def model(rng: random.Random) -> bytes:
    proto = pb.ModelProto()
    proto.trainer_spec.model_type = pb.TrainerSpec.BPE
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    for piece, kind in (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)):
        proto.pieces.add(piece=piece, score=0, type=kind)
    pieces = {}
    known = ["\u2581", "a", "b", "c", "d"]
    for piece in known:
        pieces[piece] = NORMAL if rng.random() < 0.8 else UNUSED
    while len(pieces) < 40:
        piece = rng.choice(known) + rng.choice(known)
        if len(piece) > 6 or piece in pieces:
            continue
        known.append(piece)
        pieces[piece] = NORMAL if rng.random() < 0.6 else UNUSED
    for i, (piece, kind) in enumerate(pieces.items()):
        score = -i if rng.random() < 0.8 else -rng.randrange(len(pieces))
        proto.pieces.add(piece=piece, score=score, type=kind)
    return proto.SerializeToString()


def main() -> None:
    rng = random.Random(5)
    models = []
    for _ in range(12):
        content = model(rng)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        texts = ["".join(rng.choice("aabbcd e") for _ in range(rng.randrange(1, 60))) for _ in range(40)]
        models.append({"model": base64.b64encode(content).decode(),
                       "cases": [{"text": text, "ids": processor.encode(text)} for text in texts]})
    (HERE / "unused_pieces.json").write_text(json.dumps(models) + "\n")


if __name__ == "__main__":
    main()
