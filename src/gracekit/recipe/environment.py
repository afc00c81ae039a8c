"""What a result was made with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch

import gracekit

PACKAGES = ("torch", "torchao", "transformers", "accelerate", "safetensors", "numpy", "easy-vqa")


def environment(device: torch.device) -> dict[str, object]:
    """Return versions, processor and device, as plain values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "packages": {"gracekit": gracekit.__version__} | {name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
