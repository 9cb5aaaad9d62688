"""Judges the demo's run: lets it answer, scores the answers, and computes baselines. Runs on every rank.

torchrun --nproc-per-node 4 -m nvlm_train.demo.judge --run-dir runs/demo experiment=demo
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nvlm_train.config.schema import Recipe
from nvlm_train.data.dataset import build_encoder
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.demo.captions import READ_PROMPT, Question, read_image_paths, read_questions
from nvlm_train.demo.material import JPEG_QUALITY
from nvlm_train.demo.pages import Page, render_page
from nvlm_train.demo.text_loss import text_loss
from nvlm_train.evaluation.generate import Prompt, generate
from nvlm_train.evaluation.prompts import make_prompt
from nvlm_train.evaluation.scorers import character_error_rate, exact_match
from nvlm_train.logs import set_up_logging
from nvlm_train.parallel.topology import process_group
from nvlm_train.pipeline.round import Replica
from nvlm_train.recipe.load import load_recipe
from nvlm_train.train.start import trained_replica, untrained_replica

logger = logging.getLogger(__name__)

NUM_QUESTIONS, NUM_PAGES = 1000, 40
SEED = 20
"""Fixes the choice of test questions and the permutation of their images."""
_ANSWER_TOKENS, _PAGE_TOKENS = 8, 72


@dataclass(frozen=True)
class Judge:
    """Holds the trained model, and how its stage encodes prompts."""

    recipe: Recipe
    replica: Replica
    encoder: SampleEncoder

    def answer(
        self, questions: Sequence[str], images: Sequence[bytes], max_new_tokens: int, max_tiles: int
    ) -> list[str]:
        """Returns an answer to each question about its image, with at most `max_tiles` tiles per image."""
        tiling = replace(self.encoder.spec.tiling, max_tiles=max_tiles)
        encoder = SampleEncoder(self.encoder.tokenizer, replace(self.encoder.spec, tiling=tiling))
        prompts = [
            make_prompt(encoder, question, [image], max_new_tokens)
            for question, image in zip(questions, images, strict=True)
        ]
        return self._answers(prompts, max_new_tokens)

    def answer_text(self, questions: Sequence[str], max_new_tokens: int) -> list[str]:
        """Returns an answer to each question, without any image."""
        prompts = [make_prompt(self.encoder, each, [], max_new_tokens) for each in questions]
        return self._answers(prompts, max_new_tokens)

    def _answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        tokenizer = self.encoder.tokenizer
        answers = generate(self.replica, prompts, max_new_tokens, tokenizer.turn_end)
        return [tokenizer.decode(ids) for ids in answers]


def judge(recipe: Recipe) -> dict[str, Any]:
    """Returns every figure of the demo and a few examples."""
    started = time.perf_counter()
    stage = recipe.schedule[-1]
    who = Judge(recipe, trained_replica(recipe, stage), build_encoder(recipe.stages[stage], recipe))
    figures = _judge_questions(who) | _judge_pages(who)
    figures["text_loss"] = text_loss(recipe, who.replica, who.encoder)
    figures["text_loss_backbone"] = text_loss(recipe, untrained_replica(recipe, stage), who.encoder)
    figures["text_loss_ratio"] = figures["text_loss"] / figures["text_loss_backbone"]
    figures["judge_seconds"] = time.perf_counter() - started
    return figures


def _judge_questions(who: Judge) -> dict[str, Any]:
    chosen = random.Random(SEED).sample(read_questions("heldout"), NUM_QUESTIONS)
    paths = read_image_paths("heldout")
    ids = [question.image_id for question in chosen]
    shuffled = ids.copy()
    random.Random(SEED + 1).shuffle(shuffled)
    texts, references = [each.text for each in chosen], [each.answer for each in chosen]
    images = [paths[number].read_bytes() for number in ids]
    others = [paths[number].read_bytes() for number in shuffled]
    answers = who.answer(texts, images, _ANSWER_TOKENS, max_tiles=6)
    blind = who.answer(texts, others, _ANSWER_TOKENS, max_tiles=6)
    majority, question_only = baselines(chosen)
    return {
        "vqa_accuracy": exact_match(answers, references),
        "vqa_accuracy_shuffled_images": exact_match(blind, references),
        "vqa_majority_answer": majority,
        "vqa_question_only": question_only,
        "vqa_examples": [
            {"image": str(paths[n]), "question": q, "answer": a, "reference": r}
            for n, q, a, r in zip(ids[:12], texts, answers, references, strict=False)
        ],
    }


def baselines(chosen: Sequence[Question]) -> tuple[float, float]:
    """Returns the accuracy of the most frequent training answer: over all questions, and by question text."""
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question in read_questions("train"):
        by_question[question.text][question.answer] += 1
        overall[question.answer] += 1
    majority = overall.most_common(1)[0][0]
    references = [question.answer for question in chosen]
    guesses = [
        by_question[question.text].most_common(1)[0][0]
        if question.text in by_question
        else majority
        for question in chosen
    ]
    return exact_match([majority] * len(chosen), references), exact_match(guesses, references)


def _judge_pages(who: Judge) -> dict[str, Any]:
    pages = [render_page(index, "heldout") for index in range(NUM_PAGES)]
    images = [_jpeg(page) for page in pages]
    prompts, references = [READ_PROMPT] * len(pages), [page.text for page in pages]
    with_tiles = who.answer(prompts, images, _PAGE_TOKENS, max_tiles=6)
    thumbnail = who.answer(prompts, images, _PAGE_TOKENS, max_tiles=1)
    return {
        "page_cer_tiles": character_error_rate(with_tiles, references),
        "page_cer_thumbnail": character_error_rate(thumbnail, references),
        "page_examples": [
            {"page": number, "tiles": tiles, "thumbnail": thumb, "reference": text}
            for number, (tiles, thumb, text) in enumerate(
                zip(with_tiles[:6], thumbnail, references, strict=False)
            )
        ],
    }


def _jpeg(page: Page) -> bytes:
    stream = BytesIO()
    page.image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def main(function: Callable[[Recipe], dict[str, Any]]) -> int:
    """Writes the figures of a judge to RUN_DIR/judgement.json on rank 0."""
    parser = argparse.ArgumentParser(description=function.__doc__)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    set_up_logging(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    with process_group():
        recipe = load_recipe([f"run_dir={options.run_dir}", *options.overrides])
        figures = function(recipe)
        if dist.get_rank() == 0:
            path = Path(options.run_dir) / "judgement.json"
            path.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(judge))
