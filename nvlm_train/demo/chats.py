"""Makes text-only chats from real text. A chat is a pure function of (split, index)."""

import random
import re
from dataclasses import dataclass

from nvlm_train.demo.corpus import Split, read_paragraphs, sentences_of

MAX_WORDS = 40  # of text in one chat
KINDS = ("continue", "continue", "continue", "repeat", "capitals", "which")


@dataclass(frozen=True)
class Chat:
    """Holds one user turn and the assistant's answer to it."""

    user: str
    assistant: str

    def conversations(self) -> list[dict[str, str]]:
        """Returns the chat in the `conversations` form of the shards."""
        return [
            {"from": "human", "value": self.user},
            {"from": "gpt", "value": self.assistant},
        ]


def _continue(words: list[str], rng: random.Random) -> Chat:
    cut = rng.randint(3, max(3, len(words) // 3))
    return Chat("Continue the text: " + " ".join(words[:cut]), " ".join(words[cut:]))


def _repeat(words: list[str], rng: random.Random) -> Chat:
    text = " ".join(words[: rng.randint(4, 16)])
    return Chat("Repeat the text: " + text, text)


def _capitals(words: list[str], rng: random.Random) -> Chat:
    text = " ".join(words[: rng.randint(2, 6)])
    return Chat("Write in capitals: " + text, text.upper())


def _which(words: list[str], rng: random.Random) -> Chat:
    words = words[: rng.randint(6, 16)]
    place = rng.randrange(len(words) - 1)
    question = f"Which word comes after {words[place]}?"
    follower = words[words.index(words[place]) + 1]
    return Chat(f"{' '.join(words)}\n{question}", re.sub(r"[.,:;]$", "", follower))


MAKERS = {"continue": _continue, "repeat": _repeat, "capitals": _capitals, "which": _which}


def draw_chat(index: int, split: Split) -> Chat:
    """Returns chat `index` of a split: continue, repeat, capitalise or search a real sentence."""
    rng = random.Random(f"chat/{split}/{index}")
    paragraphs = read_paragraphs(split)
    words: list[str] = []
    while len(words) < 8:
        sentences = sentences_of(rng.choice(paragraphs))
        words = " ".join(sentences[rng.randrange(len(sentences)) :]).split(" ")[:MAX_WORDS]
    return MAKERS[rng.choice(KINDS)](words, rng)
