#!/usr/bin/env python3
"""Train examples/ngpt-tiny with the paper's recipe on the Python standard library's own sources.

Recipe (arXiv:2410.01131, section 2.6): Adam without weight decay or warm-up, learning rate decayed to zero, every matrix
renormalised after every step. The corpus is the .py files of the running interpreter (Python Software Foundation License);
one file in twenty, chosen by a hash of its name, is held out. The loss on those files is written beside the losses of a
unigram and a smoothed trigram model over the same tokens.

    python scripts/train_tiny.py --output examples/ngpt-tiny            # about 30 minutes on 2 cores
    python scripts/train_tiny.py --output /tmp/try --steps 20           # a smoke test
"""

import argparse
import hashlib
import json
import math
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ngpt import NGPTConfig, NGPTForCausalLM
from ngpt.text_files import TOKENIZER_CONFIG, for_every_transformers
from ngpt.training import normalize_weights_

CONTEXT, VOCABULARY = 256, 2048
SPECIAL = ["<pad>", "<s>", "</s>"]
SKIP = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings"}


def corpus() -> tuple[list[str], list[str]]:
    """Texts of the standard library for training and, one in twenty by hash of the relative name, held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIP & set(relative.parts) or path.stat().st_size < 200:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        bucket = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 20
        (held_out if bucket == 0 else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every byte has a token, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def to_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one stream, each opened by <s> and closed by </s>: int64 [N]."""
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    return np.array([t for e in tokenizer.encode_batch(texts) for t in (begin, *e.ids, end)], dtype=np.int64)


def n_gram_losses(train: np.ndarray, held_out: np.ndarray, mass: float = 5.0) -> tuple[float, float]:
    """Nats per token of a unigram and of a trigram model backed off with Dirichlet smoothing of the given mass."""
    a, b, c = train[:-2].tolist(), train[1:-1].tolist(), train[2:].tolist()
    one, two, three = Counter(train.tolist()), Counter(zip(b, c, strict=True)), Counter(zip(a, b, c, strict=True))
    total, uni, tri = len(train) + VOCABULARY, 0.0, 0.0
    stream = held_out.tolist()
    for x, y, z in zip(stream, stream[1:], stream[2:], strict=False):
        p1 = (one[z] + 1) / total
        p2 = (two[y, z] + mass * p1) / (one[y] + mass)
        p3 = (three[x, y, z] + mass * p2) / (two[x, y] + mass)
        uni, tri = uni - math.log(p1), tri - math.log(p3)
    return uni / (len(stream) - 2), tri / (len(stream) - 2)


@torch.no_grad()
def held_out_loss(model: NGPTForCausalLM, stream: np.ndarray, windows: int = 0) -> float:
    """Mean nats per token over consecutive windows of the context length (all of them when `windows` is 0)."""
    rows = torch.from_numpy(stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT))
    rows = rows[:: max(1, len(rows) // windows)] if windows else rows
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(16)]
    return sum(losses) / len(rows)


def train(model: NGPTForCausalLM, stream: np.ndarray, held_out: np.ndarray, args: argparse.Namespace) -> list[dict]:
    """The recipe itself; returns the loss curve."""
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95))
    rng, curve, recent = np.random.default_rng(args.seed), [], []
    data = torch.from_numpy(stream)
    bar = tqdm(range(args.steps), desc="training", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - step / args.steps)
        starts = rng.integers(0, len(stream) - CONTEXT, args.batch)
        batch = torch.stack([data[s : s + CONTEXT] for s in starts.tolist()])
        # Matrix products in bfloat16 (the parameters stay float32): half the time on a CPU that has the instructions.
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        normalize_weights_(model)
        recent.append(loss.item())
        if (step + 1) % 200 == 0:
            curve.append({"step": step + 1, "train": float(np.mean(recent)), "held_out": held_out_loss(model, held_out, 48)})
            bar.write(json.dumps(curve[-1]))
            recent.clear()
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=6000, help="optimiser steps (default 6000)")
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {CONTEXT} tokens a step (default 8)")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="at the first step; falls to 0 (default 0.01)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_texts, held_out_texts = corpus()
    tokenizer = train_tokenizer(train_texts)
    stream, held_out = to_stream(tokenizer, train_texts), to_stream(tokenizer, held_out_texts)
    config = NGPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT * 2,
        initializer_range=192**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = NGPTForCausalLM(config)
    start = time.monotonic()
    curve = train(model, stream, held_out, args)
    minutes = (time.monotonic() - start) / 60
    model.eval()
    model = model.to(torch.bfloat16).float()  # measured as it is stored
    unigram, trigram = n_gram_losses(stream, held_out)
    report = {
        "held_out_nats_per_token": {
            "ngpt": held_out_loss(model, held_out),
            "trigram": trigram,
            "unigram": unigram,
        },
        "tokens": {"train": len(stream), "held_out": len(held_out), "seen": args.steps * args.batch * CONTEXT},
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round(minutes, 1),
        "recipe": {k: v for k, v in vars(args).items() if k != "output"},
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "curve": curve,
    }
    save(model, tokenizer, report, args.output)
    print(json.dumps(report["held_out_nats_per_token"], indent=2))


def save(model: NGPTForCausalLM, tokenizer: Tokenizer, report: dict, output: Path) -> None:
    """Checkpoint in bfloat16 (alpha in float32, as published checkpoints have it), tokenizer and training report."""
    alphas = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("_alpha")}
    model.to(torch.bfloat16)
    for name, value in alphas.items():
        model.get_parameter(name).data = value
    model.generation_config.update(do_sample=False, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    model.save_pretrained(output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(output)
    path = output / TOKENIZER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(for_every_transformers(config) or config, indent=2) + "\n", encoding="utf-8")
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
