"""The small Qwen2 of the conversion tests, which answers here, too."""

from tests.convert.conftest import qwen2, qwen2_dir

__all__ = ["qwen2", "qwen2_dir"]
