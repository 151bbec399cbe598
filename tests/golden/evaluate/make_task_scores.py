#!/usr/bin/env python3
"""make_task_scores.py DATA OUT_DIR

What worker/evaluate/tasks is compared with: log-likelihoods of the continuations of the first 100 items of each
zero-shot task, by TinyStories-656K, and the accuracies that follow from them as lm-evaluation-harness defines them
(lm_eval/models: _encode_pair, loglikelihood; lm_eval/tasks: piqa, arc, hellaswag, winogrande, lambada).

DATA is the folder of test data (eval/, models/TinyStories-656K). The model runs in transformers in float64, one whole
sequence at a time, without any sharing of contexts. Items with a character outside the model's vocabulary are passed
over: implementations differ on unknown tokens. Made with torch 2.15.0 (CPU), transformers 5.24.0, tokenizers 0.23.3
(OMP_NUM_THREADS=1 is fastest); OUT_DIR gets one JSON file a task.
"""

import bz2
import json
import math
import re
import sys

import torch
import tokenizers
from transformers import AutoModelForCausalLM

N_ITEMS = 100


def hellaswag_cleanup(text):
    text = text.strip()
    # Brackets are artifacts of the WikiHow part of the data set.
    text = text.replace(" [title]", ". ")
    text = re.sub("\\[.*?\\]", "", text)
    return text.replace("  ", " ")


def jsonl(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# Each item: [(context, continuation, characters)], gold.
def questions(path):
    for doc in jsonl(path):
        context = doc["query"].rstrip() + "\nAnswer:"
        yield [(context, " " + choice, len(choice)) for choice in doc["choices"]], doc["gold"]


def winogrande(path):
    for doc in jsonl(path):
        continuation = " " + doc["continuation"]
        yield [(option, continuation, len(continuation)) for option in doc["context_options"]], doc["gold"]


def lambada(path):
    for doc in jsonl(path):
        continuation = " " + doc["continuation"]
        yield [(doc["context"], continuation, len(continuation))], 0


def hellaswag(path):
    with bz2.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    for i in range(0, len(lines) - 5, 6):
        context = hellaswag_cleanup(lines[i])
        endings = [hellaswag_cleanup(ending) for ending in lines[i + 2 : i + 6]]
        yield [(context, " " + ending, len(ending)) for ending in endings], int(lines[i + 1])


class Model:
    def __init__(self, path):
        self.tokenizer = tokenizers.Tokenizer.from_file(path + "/tokenizer.json")
        self.unknown = self.tokenizer.token_to_id("<unk>")
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        self.max_length = self.model.config.max_position_embeddings

    def encode_pair(self, context, continuation):
        n_spaces = len(context) - len(context.rstrip())
        if n_spaces > 0:
            continuation = context[-n_spaces:] + continuation
            context = context[:-n_spaces]
        whole = self.tokenizer.encode(context + continuation).ids
        head = self.tokenizer.encode(context).ids
        if len(whole) <= len(head):
            # Merged into the context's last tokens, which the harness would give a likelihood of 1: split where the
            # two encodings part.
            n = next((i for i, (a, b) in enumerate(zip(head, whole)) if a != b), len(whole) - 1)
            head = whole[:n]
        return head, whole[len(head) :]

    def score(self, head, tail):
        ids = (head + tail)[-(self.max_length + 1) :]
        with torch.no_grad():
            logits = self.model(torch.tensor([ids[:-1]])).logits[0, -len(tail) :].double()
        log_probabilities = torch.log_softmax(logits, dim=-1)
        target = torch.tensor(tail)
        greedy = bool((logits.argmax(dim=-1) == target).all())
        return log_probabilities.gather(1, target[:, None]).sum().item(), greedy, len(head + tail) > len(ids)


def mean_stderr(values):
    n = len(values)
    mean = sum(values) / n
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) / math.sqrt(n)


def argmax(values):
    return max(range(len(values)), key=lambda i: (values[i], -i))


def make(model, items):
    golden = {"items": []}
    acc, acc_norm, log_likelihoods, greedy_hits = [], [], [], []
    for index, (choices, gold) in enumerate(items):
        pairs = [model.encode_pair(context, continuation) for context, continuation, _ in choices]
        if any(model.unknown in head + tail for head, tail in pairs):
            continue
        scores = [model.score(head, tail) for head, tail in pairs]
        lls = [ll for ll, _, _ in scores]
        golden["items"].append(
            {"index": index, "gold": gold, "log_likelihoods": [round(ll, 7) for ll in lls],
             "is_truncated": any(cut for _, _, cut in scores), "is_greedy": scores[0][1]}
        )
        acc.append(float(argmax(lls) == gold))
        acc_norm.append(float(argmax([ll / chars for ll, (_, _, chars) in zip(lls, choices)]) == gold))
        log_likelihoods.append(lls[0])
        greedy_hits.append(float(scores[0][1]))
        if len(golden["items"]) == N_ITEMS:
            break
    if len(choices) > 1:
        golden |= {"accuracy": sum(acc) / len(acc), "accuracy_stderr": mean_stderr(acc)}
        golden |= {"accuracy_norm": sum(acc_norm) / len(acc), "accuracy_norm_stderr": mean_stderr(acc_norm)}
    else:
        perplexity = math.exp(-sum(log_likelihoods) / len(log_likelihoods))
        golden |= {"accuracy": sum(greedy_hits) / len(acc), "accuracy_stderr": mean_stderr(greedy_hits)}
        # Delta method: of exp(-x), from the spread of x.
        golden |= {"perplexity": perplexity, "perplexity_stderr": perplexity * mean_stderr(log_likelihoods)}
    return golden


def main():
    data, out = sys.argv[1:3]
    model = Model(data + "/models/TinyStories-656K")
    tasks = {
        "piqa": questions(data + "/eval/piqa.jsonl"),
        "arc_easy": questions(data + "/eval/arc_easy.jsonl"),
        "arc_challenge": questions(data + "/eval/arc_challenge.jsonl"),
        "hellaswag": hellaswag(data + "/eval/hellaswag_val_full.txt.bz2"),
        "winogrande": winogrande(data + "/eval/winogrande.jsonl"),
        "lambada_openai": lambada(data + "/eval/lambada_openai.jsonl"),
    }
    for name, items in tasks.items():
        golden = make(model, items)
        with open(f"{out}/{name}.json", "w", encoding="utf-8") as file:
            json.dump(golden, file, indent=1)
            file.write("\n")
        print(name, {k: v for k, v in golden.items() if k != "items"}, len(golden["items"]), "items, truncated",
              sum(item["is_truncated"] for item in golden["items"]), "last index", golden["items"][-1]["index"])


main()
