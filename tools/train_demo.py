#!/usr/bin/env python3
"""Train the small demo checkpoint that ships inside the package, and write it as a Hugging Face folder.

    python tools/train_demo.py --text a.txt b.txt --out src/quire/demo_model

The schedule follows the clock (``--minutes``), so a busy machine yields fewer steps and not a longer run. It may be
stopped at any time: ``--resume`` carries on, and ``--export-only`` writes the best checkpoint so far.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS = 0, 1, 2
# Words, numbers and punctuation take one leading space; a run of line breaks is one piece, so that a paragraph break
# costs one token; no piece mixes letters with punctuation, which would thin out an already small corpus.
SPLIT = r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}{1,4}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?!\S)|\s+"
CHAPTER = re.compile(r"^(?:CHAPTER|ADVENTURE|APPENDIX)\b|^[IVXL]+\. +THE [A-Z]")
MARKS = "<!-- figures: written by tools/train_demo.py -->", "<!-- end of figures -->"
# Model and optimiser settings; each is an option of the command line too.
SETTINGS: dict[str, int | float] = {
    "vocab": 4096, "hidden": 256, "layers": 4, "heads": 8, "kv_heads": 4, "mlp": 704, "context": 1024, "dropout": 0.05,
    "batch_tokens": 4096, "warmup": 40, "lr": 0.02, "lr_embed": 0.004, "weight_decay": 0.1, "weight_decay_embed": 0.05,
}  # fmt: skip


def clean(text: str) -> list[str]:
    """Turn one plain-text book into a list of paragraphs of running prose or verse."""
    # Back matter (appendices, an index) is tables and page numbers, and would otherwise be the held-out tail.
    text = re.split(r"(?m)^(?:APPENDIX|INDEX)$", text)[0]
    text = re.sub(r"\[\d+\]", "", text.replace("\r\n", "\n").replace("\t", " "))
    text = re.sub(r"[_=](?=\S)|(?<=\S)[_=]", "", text)  # marks of italics and bold
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.strip("\n").split("\n")]
        # Drop tables and bibliography: little to learn from, and ugly when sampled.
        if re.search(r"\S {3,}\S|\||\bpp?\. ?\d", block) or not any(lines):
            continue
        # Prose wrapped at a fixed width becomes one line; verse and speeches (short lines) keep their line breaks.
        wrapped = len(lines) > 1 and all(len(line) > 50 for line in lines[:-1])
        paragraphs.append((" " if wrapped else "\n").join(lines))
    return paragraphs


def split_held_out(paragraphs: list[str], share: float) -> tuple[list[str], str]:
    """Cut the last ``share`` of a book off, and the rest into documents at its chapter headings."""
    total, tail, cut = sum(map(len, paragraphs)), 0, len(paragraphs)
    while cut > 1 and tail < share * total:
        cut -= 1
        tail += len(paragraphs[cut])
    documents: list[list[str]] = [[]]
    for paragraph in paragraphs[:cut]:
        if CHAPTER.match(paragraph) and documents[-1]:
            documents.append([])
        documents[-1].append(paragraph)
    return ["\n\n".join(document) for document in documents], "\n\n".join(paragraphs[cut:])


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer: any text round-trips, and encoding puts ``<s>`` first as Llama's do."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    template = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", BOS)]}
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    return tokenizer


def windows(data: np.ndarray, starts: np.ndarray, length: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield training windows for ever, each beginning with ``<s>``; one pass covers the data at a random offset.

    A window moves back to the start of its paragraph where that is near, because prompts begin that way.
    """
    while True:
        for offset in rng.permutation(np.arange(rng.integers(length), len(data) - length, length - 1)):
            start = starts[np.searchsorted(starts, offset, side="right") - 1]
            start = start if offset - start <= length // 4 else offset
            yield np.concatenate(([BOS], data[start + (data[start] == BOS) :][: length - 1]))


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Make a freshly initialised model, with dropout on the embeddings and on what each MLP adds to them."""
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads, intermediate_size=args.mlp, max_position_embeddings=args.context,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "down_proj")):
            module.register_forward_hook(lambda m, _, out: F.dropout(out, args.dropout, m.training))
    return model


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps; learns faster per token than AdamW.

    Unlike ``torch.optim.Muon`` it works in float32 (bfloat16 crawls on older CPUs), on all matrices of a shape at once.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        shapes = sorted({tuple(p.shape) for p in params})
        groups = [{"params": [p for p in params if tuple(p.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every matrix once."""
        for group in self.param_groups:
            params, momentum = group["params"], group["momentum"]
            grad = torch.stack([p.grad for p in params])
            buffer = self.state[params[0]].setdefault("buffer", torch.zeros_like(grad))
            buffer.lerp_(grad, 1 - momentum)
            x = grad.lerp(buffer, momentum)
            rows, columns = x.shape[1:]
            x = x.mT if rows > columns else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            x = x.mT if rows > columns else x
            for p, update in zip(params, x, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, texts: list[list[int]], length: int) -> float:
    """Return the mean loss in nats per token over ``texts``, in windows of ``length`` that begin with ``<s>``."""
    model.eval()
    total = 0.0
    for ids in texts:
        for i in range(0, len(ids), length - 1):
            window = torch.tensor([[BOS, *ids[i : i + length - 1]]])
            total += F.cross_entropy(model(window).logits[0, :-1], window[0, 1:], reduction="sum").item()
    model.train()
    return total / sum(map(len, texts))


def train(args: argparse.Namespace, data: np.ndarray, starts: np.ndarray, held_out: list[list[int]]) -> None:
    """Train until the time is used up; keep the best held-out weights in ``best.pt`` and all of it in ``state.pt``."""
    torch.manual_seed(args.seed)
    model = build_model(args)
    params = list(model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    muon = Muon(matrices, args.lr, args.weight_decay)
    adam = torch.optim.AdamW(others, args.lr_embed, (0.9, 0.95), weight_decay=args.weight_decay_embed)
    optimisers = [muon, adam]
    for group in muon.param_groups + adam.param_groups:
        group["peak"] = group["lr"]
    state_file, step, spent, best, tokens = args.work / "state.pt", 0, 0.0, math.inf, 0
    if args.resume and state_file.exists():
        saved = torch.load(state_file)
        model.load_state_dict(saved["model"])
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        step, spent, best, tokens = saved["step"], saved["spent"], saved["best"], saved["tokens"]
    print(f"{sum(p.numel() for p in params) / 1e6:.2f} M parameters, {len(data)} tokens, from step {step}", flush=True)

    # One thread for each part of the batch: operators this small lose time where threads meet, above all on a busy CPU.
    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))

    def gradients(batch: torch.Tensor) -> tuple[float, tuple[torch.Tensor, ...]]:
        loss = F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        return loss.item(), torch.autograd.grad(loss, params)

    rng = np.random.default_rng(args.seed + step)
    length, began, last_eval = 0, time.monotonic() - spent, spent
    while True:
        spent = time.monotonic() - began
        done = spent / (60 * args.minutes)
        # Short windows first (cheap, varied batches), whole-context ones at the end so that every position is learnt.
        wanted = args.context // (4 if done < 0.65 else 2 if done < 0.88 else 1)
        if wanted != length:
            length, source = wanted, windows(data, starts, wanted, rng)
        # Warm up, hold, then decay to zero over the last 60 %: a decayed end is worth more than the best of a plateau.
        scale = min(1.0, (step + 1) / args.warmup, max(0.0, 1 - done) / 0.6)
        for group in muon.param_groups + adam.param_groups:
            group["lr"] = group["peak"] * scale
        if spent - last_eval > 60 * args.eval_minutes or done >= 1:
            last_eval, loss = spent, held_out_loss(model, held_out, args.context)
            print(f"== held out {loss:.4f} (best {min(best, loss):.4f}) epoch {tokens / len(data):.1f}", flush=True)
            state = {"model": model.state_dict(), "step": step, "tokens": tokens, "loss": loss}
            if loss < best:
                best = loss
                torch.save(state | {"minutes": spent / 60, "limit": args.minutes}, args.work / "best.pt")
            state |= {"optimisers": [o.state_dict() for o in optimisers], "spent": spent, "best": best}
            torch.save(state, args.work / "state.tmp")  # renamed when whole, so that a stop here loses nothing
            (args.work / "state.tmp").replace(state_file)
        if done >= 1:
            return
        batch = torch.from_numpy(np.stack([next(source) for _ in range(args.batch_tokens // length)]))
        losses, grads = zip(*pool.map(gradients, batch.chunk(args.threads)), strict=True)
        for parameter, *shares in zip(params, *grads, strict=True):
            parameter.grad = torch.stack(shares).mean(0)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimiser in optimisers:
            optimiser.step()
        step, tokens = step + 1, tokens + batch.numel()
        if step % 20 == 0:
            print(f"step {step} loss {np.mean(losses):.3f} lr x{scale:.2f} {spent / 60:.1f} min", flush=True)


def export(args: argparse.Namespace, tokenizer: Tokenizer, tails: list[str], held_out: list[list[int]]) -> str:
    """Write the best checkpoint as a Hugging Face folder; load it back and return its figures for the model card."""
    best = torch.load(args.work / "best.pt")
    model = build_model(args)
    model.load_state_dict(best["model"])
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": args.context}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(args.out)

    stored = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    reader = AutoTokenizer.from_pretrained(args.out)
    assert all(reader.decode(reader.encode(text, verbose=False), skip_special_tokens=True) == text for text in tails)
    rows = [("all, before rounding to bfloat16", best["loss"], held_out, tails)]
    rows += [("all, as stored", held_out_loss(stored, held_out, args.context), held_out, tails)]
    for path, ids, text in zip(args.text, held_out, tails, strict=True):
        rows += [(f"{path.name}, as stored", held_out_loss(stored, [ids], args.context), [ids], [text])]
    lines = ["| held-out text | tokens | nats per token | perplexity | bits per byte |", "|---|---|---|---|---|"]
    for name, loss, ids, text in rows:
        count, size = sum(map(len, ids)), sum(len(t.encode()) for t in text)
        bits = loss * count / math.log(2) / size
        lines.append(f"| {name} | {count} | {loss:.3f} | {math.exp(loss):.1f} | {bits:.3f} |")
    run = f"{best['step']} steps, {best['tokens']} tokens in all, {best['minutes']:.0f} of {best['limit']:g} minutes"
    parameters = sum(p.numel() for p in stored.parameters())
    return "\n".join([*lines, f"\n{parameters} parameters; {run} on {args.threads} CPU threads; {date.today()}."])


def main() -> None:
    """Parse the command line, train, export, and bring the figures in the model card up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, metavar="FILE", help="plain-text books, UTF-8")
    add("--out", type=Path, default=Path("src/quire/demo_model"), help="the folder to write")
    add("--work", type=Path, default=Path("build/train_demo"), help="state and best weights, to resume from")
    add("--resume", action="store_true", help="carry on from the state in --work")
    add("--export-only", action="store_true", help="do not train: write the best checkpoint in --work to --out")
    add("--minutes", type=float, default=60, help="time to train")
    add("--eval-minutes", type=float, default=5, help="time between looks at the held-out loss")
    add("--held-out", type=float, default=0.025, help="share of each book, at its end, that is not trained on")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--seed", type=int, default=1, help="for the weights, the dropout and the order of the text")
    for name, value in SETTINGS.items():
        add(f"--{name.replace('_', '-')}", type=type(value), default=value, help="(default: %(default)s)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)

    books = [split_held_out(clean(path.read_text(encoding="utf-8")), args.held_out) for path in args.text]
    documents, tails = [document for book, _ in books for document in book], [tail for _, tail in books]
    tokenizer = train_tokenizer(documents, args.vocab)
    ids = [[BOS, *encoding.ids, EOS] for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)]
    held_out = [encoding.ids for encoding in tokenizer.encode_batch(tails, add_special_tokens=False)]
    data = np.concatenate([np.array(document) for document in ids])
    breaks = [i for i in range(args.vocab) if i == BOS or "\n\n" in tokenizer.decode([i])]
    starts = np.concatenate(([0], np.flatnonzero(np.isin(data[:-1], breaks)) + 1))
    if not args.export_only:
        train(args, data, starts, held_out)

    figures = f"{len(data)} tokens of training text.\n\n{export(args, tokenizer, tails, held_out)}"
    print(figures)
    card = args.out / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else "\n".join(("# Demo model", "", *MARKS, ""))
    parts = text.split(MARKS[0])[0], MARKS[0], f"\n\n{figures}\n\n", MARKS[1], text.split(MARKS[1])[-1]
    card.write_text("".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
