"""The errors a user can meet. Messages read `name=value`, the rule, the remedy."""

from __future__ import annotations

from collections.abc import Sequence


class NvlmError(Exception):
    """Base of every error that is the user's to fix; the command line prints it without a traceback."""


class ConfigError(NvlmError):
    """A recipe that cannot be run. Carries every problem found, not only the first."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"  - {problem}" for problem in self.problems))


class ShardError(NvlmError):
    """A shard that is missing, torn, or no longer the one that was indexed."""


class SampleError(NvlmError):
    """A sample that cannot be trained on. Names the shard and the key; the loader may count and skip it."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        self.shard, self.key, self.reason = shard, key, reason
        super().__init__(f"sample={key} in shard={shard}: {reason}")


class PromptError(NvlmError):
    """A prompt that cannot be answered."""


class CheckpointError(NvlmError):
    """A checkpoint that does not fit the recipe, or none where one is needed."""


class FormatError(CheckpointError):
    """Something stored in a format that this version does not read. It is not damaged."""


class TrainingError(NvlmError):
    """Training that cannot go on: a non-finite loss, or more bad samples than the recipe tolerates."""


class RunLockedError(NvlmError):
    """A run directory that another process writes to, or may write to."""


class LaunchError(NvlmError):
    """A job that should not be queued."""
