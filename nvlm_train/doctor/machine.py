"""Checks this rank's machine: GPU, driver, libraries, kernels, and memory for the model."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

from nvlm_train import costs
from nvlm_train.config.schema import Recipe
from nvlm_train.doctor.finding import Finding, Findings, error, ok, warning
from nvlm_train.doctor.stack import check_stack, here
from nvlm_train.doctor.storage import gigabytes

LIBRARIES = ("torch", "megatron-core", "transformer-engine", "apex", "wandb")


def versions() -> dict[str, str]:
    """Returns the versions of Python and the libraries, `-` for those that are not installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found


def check_machine(recipe: Recipe | None) -> Findings:
    """Reports versions, device and kernels, and whether a rank's share of the model fits the device."""
    import torch

    from nvlm_train.parallel import kernels

    yield ok("versions", " ".join(f"{name}={value}" for name, value in versions().items()))
    yield from check_stack(here())
    if not torch.cuda.is_available():
        yield _no_gpu()
    else:
        driver = _driver()
        for number in range(torch.cuda.device_count()):
            yield _gpu(number, driver)
    yield ok("kernels", str(kernels.detect()))
    if recipe is None:
        return
    if recipe.precision == "bf16" and not kernels.multiplies_bf16():
        text = "precision=bf16, and this CPU computes bf16 products in fp32: slower than fp32 alone"
        yield warning("kernels", text, "set precision=fp32")
    yield from _memory(recipe)


def _no_gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return ok("gpu", f"none; training runs on the CPU ({os.cpu_count()} cores)")
    import torch

    return error(
        "gpu",
        f"there is an NVIDIA driver ({_driver()}), but torch {torch.__version__} sees no GPU",
        "install a CUDA build of torch that the driver is new enough for; look at CUDA_VISIBLE_DEVICES",
    )


def _gpu(number: int, driver: str) -> Finding:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    name = torch.cuda.get_device_name(number)
    text = (
        f"{number}: {name}, {gigabytes(free)} of {gigabytes(total)} free, driver {driver}, "
        f"CUDA {torch.version.cuda}"
    )
    if free < 0.9 * total:
        return warning("gpu", text, "another process holds memory there: `nvidia-smi` names it")
    return ok("gpu", text)


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return (found.stdout.splitlines() or ["unknown"])[0]


def _memory(recipe: Recipe) -> Findings:
    import torch

    world = int(os.environ.get("WORLD_SIZE", "1"))
    for name in recipe.schedule:
        stage = recipe.stages[name]
        replica = stage.parallel.tensor * stage.parallel.pipeline
        needed = costs.rank_memory(recipe.model, stage, recipe.precision, max(1, world // replica))
        activations = costs.activation_bytes(recipe.model, stage, recipe.precision)
        text = (
            f"stage {name}: {gigabytes(needed)} a rank before activations, "
            f"{gigabytes(activations)} of full packs' activations"
        )
        needed += activations
        if not torch.cuda.is_available():
            yield ok("memory", text)
            continue
        total = torch.cuda.mem_get_info()[1]
        if needed > total:
            yield error(
                "memory",
                f"{text}, and a GPU has {gigabytes(total)}",
                f"raise stages.{name}.parallel.tensor or .pipeline, or recompute more",
            )
        elif needed > 0.8 * total:
            remedy = f"raise stages.{name}.parallel.tensor or .pipeline, or recompute more"
            yield warning("memory", f"{text}, of {gigabytes(total)}", remedy)
        else:
            yield ok("memory", f"{text}, of {gigabytes(total)}")
