"""Packaging. The recipes lie at the top of the repository and are installed inside the package."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"', (ROOT / "nvlm_train" / "__init__.py").read_text(), re.MULTILINE
)

REQUIRED = [
    # A range, so that pip leaves alone the torch of a GPU machine; constraints.txt pins it for CPUs.
    # All ranges that matter beside each other: nvlm_train/doctor/stack.py.
    "torch>=2.10.0a0,<2.14",
    "megatron-core>=0.16.1,<0.17",
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.2,<2.4",
    "packaging>=24.2",
    "PyYAML>=6",
    "numpy>=1.26",
    "pillow>=10",
    "simplejpeg>=1.7",
    "isal>=1.7",
    "webdataset>=1.0",
    "fsspec>=2024.2",
    "safetensors>=0.4",
    "tokenizers>=0.20",
    "rich>=13",
    "wandb>=0.31",
    # Without it megatron-core's checkpoint writer hangs silently; it does not require it.
    "psutil>=5.9",
]

EXTRAS = {
    "http": ["aiohttp>=3.10"],
    # megatron-core 0.16.1 takes 2.9 to 2.11. The core library has to be for torch's CUDA.
    "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
    "gpu-cu12": ["transformer-engine[core_cu12,pytorch]>=2.9,<2.12"],
    # `nvlm data prepare parquet` and `datasets`.
    "prepare": ["pyarrow>=17", "datasets>=3"],
    "dashboard": ["wandb-workspaces>=0.4.13"],
    # `nvlm convert gguf`.
    "convert": ["gguf>=0.17"],
    "demo": ["easy-vqa==1.0", "gguf>=0.17", "matplotlib>=3.8", "transformers>=4.57"],
    "check": ["ImageHash>=4.3.2"],
    "dev": [
        "aiohttp>=3.10",
        "gguf>=0.17",
        "ImageHash>=4.3.2",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.8",
        "hypothesis>=6.100",
        "ruff>=0.14",
        "mypy>=1.14",
        "pre-commit>=4",
        "types-PyYAML>=6.0.12",
        "transformers>=4.57",
        "pyarrow>=17",
        "datasets>=3",
        "wandb-workspaces>=0.4.13",
    ],
}

setup(
    name="nvlm-train",
    version=VERSION.group(1) if VERSION else "0",
    description="Trains NVLM-style multimodal language models on megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[
        *find_packages(include=["nvlm_train", "nvlm_train.*"]),
        "nvlm_train.recipes",
        "nvlm_train.data_recipes",
        "nvlm_train.launch",
    ],
    package_dir={
        "nvlm_train.recipes": "recipes",
        "nvlm_train.data_recipes": "data_recipes",
        "nvlm_train.launch": "launch",
    },
    package_data={
        "nvlm_train": ["py.typed"],
        "nvlm_train.data": ["prompts.yaml"],
        "nvlm_train.demo": ["report.html", "assets/**/*", "assets/*"],
        "nvlm_train.data.viewing": ["page.html"],
        "nvlm_train.recipes": ["*.yaml", "*/*.yaml"],
        "nvlm_train.data_recipes": ["*.yaml"],
        "nvlm_train.launch": ["*.sh", "*.sbatch", "*.txt"],
    },
    include_package_data=False,
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["nvlm = nvlm_train.cli:main"]},
)
