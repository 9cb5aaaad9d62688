"""Trains the demo's language model: a small Qwen2, on real text, chats and text twins.

Shapes: B samples of a micro-batch, S positions (padded right; causal attention needs no mask), V
vocabulary rows, N trained positions.
"""

import logging
import math
import random
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

from nvlm_train.demo.backbones.muon import Muon
from nvlm_train.demo.backbones.tokenizer import IM_END_ID, IM_START_ID, PAD_ID, VOCAB_SIZE
from nvlm_train.demo.backbones.twins import ShapeTwins, Twin, page_twin, strip_twin
from nvlm_train.demo.chats import draw_chat
from nvlm_train.demo.corpus import Split, read_paragraphs

logger = logging.getLogger(__name__)

CONFIG = Qwen2Config(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    attention_dropout=0.0,
    bos_token_id=None,
    pad_token_id=PAD_ID,
    eos_token_id=IM_END_ID,
)
SYSTEM_PROMPT = "Answer the questions."
MAX_TOKENS = 256  # of a sample; longer ones lose their end
IGNORED = -100


class Share(NamedTuple):
    """Says how much of a step one kind of sample is."""

    num_samples: int
    weight: float
    """Weight of the kind's mean loss per token."""


# The answer about a drawing has one or two tokens: weighted by tokens, it would hardly count beside
# the characters of pages.
MIXTURE = {
    "page": Share(16, 1.0),
    "strip": Share(8, 0.2),
    "shape": Share(48, 1.0),
    "chat": Share(16, 1.0),
    "text": Share(6, 0.4),
}
PEAK_LR = 3e-3
WARMUP_STEPS = 30
CONTINUED_FROM_STEP = 100_000  # so that a continued run draws other samples

Sample = tuple[list[int], list[int]]  # (ids, labels), labels[i] belongs to ids[i]


class SampleMaker:
    """Draws tokenised samples. A sample is a pure function of its kind and index."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.shapes = ShapeTwins()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text."""
        return list(self.tokenizer.encode(text).ids)

    def twin(self, twin: Twin, system: bool) -> Sample:
        """Returns ChatML of one user turn and its answer. Only the answer and its end are trained."""
        pieces, answer = twin
        ids: list[int] = []
        if system:
            ids += [IM_START_ID, *self.encode(f"system\n{SYSTEM_PROMPT}"), IM_END_ID]
            ids += self.encode("\n")
        ids += [IM_START_ID, *self.encode("user\n")]
        for piece in pieces:
            parts = [piece] if isinstance(piece, str) else piece
            ids += [token for part in parts for token in self.encode(part)]
        ids += [IM_END_ID, *self.encode("\n"), IM_START_ID, *self.encode("assistant\n")]
        trained = [*self.encode(answer), IM_END_ID, *self.encode("\n")]
        return ids + trained, [IGNORED] * len(ids) + trained

    def chat(self, index: int, split: Split, system: bool = False) -> Sample:
        """Returns a text-only chat."""
        chat = draw_chat(index, split)
        return self.twin(([chat.user], chat.assistant), system)

    def text(self, index: int) -> Sample:
        """Returns a training paragraph as plain text, of which every token is trained."""
        paragraphs = read_paragraphs("train")
        ids = [*self.encode(paragraphs[index % len(paragraphs)]), PAD_ID]
        return ids, ids

    def draw(self, kind: str, index: int) -> Sample:
        """Returns sample `index` of a kind of `MIXTURE`."""
        rng = random.Random(f"{kind}/{index}")
        system = rng.random() < 0.3
        if kind == "chat":
            return self.chat(index, "train", system)
        if kind == "text":
            return self.text(rng.randrange(1 << 30))
        if kind == "page":
            return self.twin(page_twin(rng), system)
        return self.twin(strip_twin(rng) if kind == "strip" else self.shapes.draw(rng), system)


def collate(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids [B, S] and labels [B, S], padded right to the longest sample."""
    longest = min(MAX_TOKENS, max(len(ids) for ids, _ in samples))
    ids_BS = torch.zeros(len(samples), longest, dtype=torch.long)
    labels_BS = torch.full((len(samples), longest), IGNORED)
    for row, (ids, labels) in enumerate(samples):
        ids_BS[row, : len(ids)] = torch.tensor(ids[:longest])
        labels_BS[row, : len(labels)] = torch.tensor(labels[:longest])
    return ids_BS, labels_BS


def summed_loss(model: Qwen2ForCausalLM, samples: list[Sample]) -> tuple[torch.Tensor, int]:
    """Returns the cross-entropy summed over the trained tokens, and their number."""
    ids_BS, labels_BS = collate(samples)
    hidden_BSH = model.model(input_ids=ids_BS).last_hidden_state
    trained_BS = labels_BS[:, 1:] != IGNORED
    logits_NV = model.lm_head(hidden_BSH[:, :-1][trained_BS])
    labels_N = labels_BS[:, 1:][trained_BS]
    return functional.cross_entropy(logits_NV, labels_N, reduction="sum"), labels_N.numel()


@torch.no_grad()
def heldout_loss(model: Qwen2ForCausalLM, maker: SampleMaker, num_chats: int = 400) -> float:
    """Returns the mean cross-entropy per trained token over held-out chats."""
    total, count = 0.0, 0
    for start in range(0, num_chats, 50):
        chats = [maker.chat(index, "heldout") for index in range(start, start + 50)]
        loss, tokens = summed_loss(model, chats)
        total, count = total + loss.item(), count + tokens
    return total / count


def _optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices and AdamW for everything else."""
    named = [(name, p) for name, p in model.named_parameters()]
    matrices = [p for name, p in named if p.ndim == 2 and "layers" in name]
    others = [p for name, p in named if not (p.ndim == 2 and "layers" in name)]
    muon = Muon(matrices, lr=PEAK_LR)
    return [muon, torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0)]


def _relative_lr(done: float, step: int) -> float:
    """Returns the rate over its peak: a linear warm-up, then a cosine. `done` goes from 0 to 1."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train_step(
    model: Qwen2ForCausalLM,
    batches: dict[str, list[Sample]],
    optimizers: list[torch.optim.Optimizer],
) -> dict[str, float]:
    """Makes one optimizer step over a micro-batch of each kind. Returns the mean loss of each kind."""
    losses: dict[str, float] = {}
    for kind, samples in batches.items():
        loss, tokens = summed_loss(model, samples)
        (MIXTURE[kind].weight * loss / tokens).backward()
        losses[kind] = loss.item() / tokens
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train_language(
    maker: SampleMaker,
    num_steps: int,
    start: Qwen2ForCausalLM | None = None,
    on_log: Callable[[int, Qwen2ForCausalLM], None] | None = None,
) -> Qwen2ForCausalLM:
    """Trains the language model from random weights, or goes on from `start` with other samples."""
    torch.manual_seed(0)
    model = start or Qwen2ForCausalLM(CONFIG)
    first = CONTINUED_FROM_STEP if start else 0
    optimizers, began = _optimizers(model), time.monotonic()
    for step in range(num_steps):
        batches = {
            kind: [
                maker.draw(kind, (first + step) * share.num_samples + number)
                for number in range(share.num_samples)
            ]
            for kind, share in MIXTURE.items()
        }
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * _relative_lr(step / num_steps, step)
        losses = train_step(model, batches, optimizers)
        if step % 25 == 0 or step == num_steps - 1:
            shown = " ".join(f"{kind} {value:.3f}" for kind, value in losses.items())
            logger.info("language step %d %s (%.0f s)", step, shown, time.monotonic() - began)
            if on_log:
                on_log(step, model)
    return model
