"""What the machine has, asked of the system and not of torch."""

from __future__ import annotations

from pathlib import Path


def has_nvidia_gpu() -> bool:
    """Whether a driver of NVIDIA's is at work."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()
