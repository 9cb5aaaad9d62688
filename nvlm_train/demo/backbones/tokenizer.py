"""Trains the demo's tokenizer: a small byte-level BPE in which a capital letter is always one token.

Pages are set in capitals, so one character on a page is one visual token and one text token.
Lower-case words are merged as usual, which keeps questions and prose short.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nvlm_train.demo.captions import CAPTION_PROMPT, READ_PROMPT, read_captions, read_questions
from nvlm_train.demo.chats import draw_chat

PAD, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_ID, IM_START_ID, IM_END_ID = range(3)  # special tokens come first in the vocabulary
VOCAB_SIZE = 640
NUM_CHATS = 6000
# Alternatives: a tag's name; a lower-case word with its space; a number in a tag; one character.
WORD_PATTERN = r"</?\p{L}+|[ _]?\p{Ll}+|_\p{N}|\p{L}|\p{N}|[^\s\p{L}\p{N}]|\s"
TAGS = "<Image>" + "".join(f"<tile_{n}>" for n in range(1, 7)) + "<tile_global_thumbnail></Image>\n"


def training_texts() -> Iterable[str]:
    """Yields training chats, easy-vqa's training questions and captions, and the tags."""
    for index in range(NUM_CHATS):
        chat = draw_chat(index, "train")
        yield chat.user + "\n" + chat.assistant
    for question in read_questions("train")[:NUM_CHATS]:
        yield f"user\n{TAGS}{question.text}\nassistant\n {question.answer}\n{question.answer}"
    for caption in read_captions().values():
        yield f"system\nAnswer the questions.\n{CAPTION_PROMPT} {READ_PROMPT} {caption}"


def train_tokenizer() -> Tokenizer:
    """Trains the byte-level BPE. Ids 0, 1 and 2 are the special tokens; 0 also pads."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` and the configuration that transformers' AutoTokenizer reads."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=IM_END,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
