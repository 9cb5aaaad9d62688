"""Judges the demo on SmolLM2: the same questions before training and after. Runs on every rank.

torchrun --nproc-per-node 2 -m nvlm_train.demo.before_after --run-dir RUN_DIR experiment=demo_smollm2
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

from nvlm_train.config.schema import Recipe
from nvlm_train.data.dataset import build_encoder
from nvlm_train.demo.captions import read_image_paths, read_questions
from nvlm_train.demo.judge import SEED, Judge, baselines, main
from nvlm_train.demo.smollm2 import NUM_BEFORE, NUM_QUESTIONS
from nvlm_train.demo.text_loss import text_loss
from nvlm_train.evaluation.scorers import exact_match
from nvlm_train.train.start import trained_replica, untrained_replica

NUM_CHATS = 40
TEXT_QUESTIONS = (
    "What is the capital of France?",
    "Which planet is known as the Red Planet?",
    "Write one sentence about the sea.",
)
_ANSWER_TOKENS, _TEXT_TOKENS = 8, 24
_MAX_TILES = 1


def judge(recipe: Recipe) -> dict[str, Any]:
    """Returns every figure of the demo on SmolLM2, and what it answered before and after."""
    started = time.perf_counter()
    stage = recipe.schedule[-1]
    encoder = build_encoder(recipe.stages[stage], recipe)
    before = _untrained(Judge(recipe, untrained_replica(recipe, stage), encoder))
    after = _trained(Judge(recipe, trained_replica(recipe, stage), encoder))
    figures = before | after
    for name in ("vqa_examples", "text_examples"):
        pairs = zip(after[name], before[name], strict=False)
        figures[name] = [new | {"before": old["answer"]} for new, old in pairs]
    figures["text_loss_ratio"] = figures["text_loss"] / figures["text_loss_backbone"]
    figures["judge_seconds"] = time.perf_counter() - started
    return figures


def _untrained(who: Judge) -> dict[str, Any]:
    accuracy, examples = _ask(who, NUM_BEFORE)
    return {
        "vqa_accuracy_untrained": accuracy,
        "vqa_examples": examples,
        "text_examples": _ask_text(who),
        "text_loss_backbone": text_loss(who.recipe, who.replica, who.encoder, NUM_CHATS),
    }


def _trained(who: Judge) -> dict[str, Any]:
    accuracy, examples = _ask(who, NUM_QUESTIONS)
    blind, _ = _ask(who, NUM_QUESTIONS, shuffled=random.Random(SEED + 1))
    majority, question_only = baselines(_questions(NUM_QUESTIONS))
    return {
        "vqa_accuracy": accuracy,
        "vqa_accuracy_shuffled_images": blind,
        "vqa_majority_answer": majority,
        "vqa_question_only": question_only,
        "vqa_examples": examples,
        "text_examples": _ask_text(who),
        "text_loss": text_loss(who.recipe, who.replica, who.encoder, NUM_CHATS),
    }


def _questions(count: int) -> list[Any]:
    return random.Random(SEED).sample(read_questions("heldout"), NUM_QUESTIONS)[:count]


def _ask(
    who: Judge, count: int, shuffled: random.Random | None = None
) -> tuple[float, list[dict[str, Any]]]:
    """Returns the accuracy on test questions, and the first dozen of answers.

    Args:
        who: the model.
        count: the first of the `NUM_QUESTIONS` fixed questions.
        shuffled: permutes the images between the questions.
    """
    chosen, paths = _questions(count), read_image_paths("heldout")
    ids = [question.image_id for question in chosen]
    if shuffled:
        shuffled.shuffle(ids)
    texts = [question.text for question in chosen]
    images = [paths[number].read_bytes() for number in ids]
    answers = who.answer(texts, images, _ANSWER_TOKENS, _MAX_TILES)
    references = [question.answer for question in chosen]
    examples = [
        {"image": str(paths[n]), "question": q, "answer": a, "reference": r}
        for n, q, a, r in zip(ids[:12], texts, answers, references, strict=False)
    ]
    return exact_match(answers, references), examples


def _ask_text(who: Judge) -> list[dict[str, Any]]:
    answers = who.answer_text(TEXT_QUESTIONS, _TEXT_TOKENS)
    return [
        {"question": question, "answer": answer}
        for question, answer in zip(TEXT_QUESTIONS, answers, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main(judge))
