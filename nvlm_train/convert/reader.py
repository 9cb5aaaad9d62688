"""Reads a language model of Hugging Face into any layout: of each file, the slices that a rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.convert.headers import read_headers
from nvlm_train.convert.language import language_problems
from nvlm_train.convert.names import GlobalSlice, Piece, pieces_of
from nvlm_train.convert.problem import refuse
from nvlm_train.convert.weight_files import WeightFiles
from nvlm_train.convert.whole.parts import own_tensors


class LanguageSource:
    """A source for `model.global_weights.fill` of the tensors in `language.weights`."""

    def __init__(self, language: LanguageConfig, files: WeightFiles) -> None:
        self.language = language
        self.files = files

    def __call__(self, wanted: GlobalSlice, into: Tensor) -> bool:
        """Writes a slice of a global tensor; returns False for tensors of other parts of the model."""
        pieces = self._stored(wanted)
        if pieces is None:
            return False
        rows = 0
        for piece in pieces:
            self.files.copy_into(into[piece.rows], piece.name, piece.index)
            rows = piece.rows.stop
        # The recipe pads the tables.
        into[rows:].zero_()
        return True

    def expect(self, slices: Iterable[GlobalSlice]) -> None:
        """Counts the bytes of what will be asked for, which the lines about progress then name."""
        for each in slices:
            for piece in self._stored(each) or ():
                self.files.bytes_expected += self.files.bytes_of(piece.name, piece.index)

    def _stored(self, wanted: GlobalSlice) -> list[Piece] | None:
        """The pieces, without rows that are in no file."""
        pieces = pieces_of(self.language, wanted)
        if pieces is None:
            return None
        return list(filter(None, (self._cut(piece) for piece in pieces)))

    def _cut(self, piece: Piece) -> Piece | None:
        first, *others = piece.index
        stop = min(first.stop, self.files.tensors[piece.name].shape[0])
        if stop <= first.start:
            return None
        own = slice(piece.rows.start, piece.rows.start + stop - first.start)
        return Piece(piece.name, (slice(first.start, stop), *others), own)


@contextmanager
def language_source(language: LanguageConfig) -> Iterator[LanguageSource]:
    """Opens `language.weights` for reading.

    Raises:
        CheckpointError: the directory is not whole, or holds another model than the recipe describes.
    """
    setting = f"model.language.weights={language.weights}"
    refuse(language_problems(language, {}))
    tensors = own_tensors("language", read_headers(Path(language.weights or ""), setting))
    with WeightFiles(tensors, setting) as files:
        yield LanguageSource(language, files)
