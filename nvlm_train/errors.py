"""The errors a user can meet. Messages read `name=value`, the rule, the remedy."""

from __future__ import annotations

from collections.abc import Sequence


class NvlmError(Exception):
    """The user can mend the cause of such an error; the command line prints it without a traceback."""


class ConfigError(NvlmError):
    """The recipe cannot be run. The error carries every problem found, not only the first."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"  - {problem}" for problem in self.problems))


class ShardError(NvlmError):
    """A shard is missing, torn, or no longer the one that was indexed."""


class SampleError(NvlmError):
    """A sample cannot be trained on. It names the shard and the key; the loader may count and skip it."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        self.shard, self.key, self.reason = shard, key, reason
        super().__init__(f"sample={key} in shard={shard}: {reason}")


class PromptError(NvlmError):
    """A prompt cannot be answered."""


class CheckpointError(NvlmError):
    """A checkpoint does not fit the recipe, or there is none where one is needed."""


class FormatError(CheckpointError):
    """Something was stored in a format that this version does not read. It is not damaged."""


class TrainingError(NvlmError):
    """Training cannot go on: a loss is not finite, or more samples are bad than the recipe tolerates."""


class RunLockedError(NvlmError):
    """Another process writes to the run directory, or may write to it."""


class LaunchError(NvlmError):
    """A job should not be queued."""
