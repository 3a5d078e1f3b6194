"""What the clouds' machine types hold: CPUs, memory, accelerators.

Figures are those of the vendors' public tables: "Amazon EC2 instance types" (accelerated computing and general
purpose), Google Cloud "Accelerator-optimized machine family" and "General-purpose machine family", and Azure "Sizes for
virtual machines" (ND, NC, NV and D series).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """The accelerators of one machine."""

    name: str
    """As in Ray's label `ray.io/accelerator-type`."""
    count: int
    memory_gib: int
    """Of one."""


@dataclass(frozen=True)
class Instance:
    """One machine type of a cloud."""

    name: str
    cpus: int
    """Virtual CPUs (threads)."""
    memory_gib: float
    accelerator: Accelerator | None = None


def known(provider: str) -> Mapping[str, Instance]:
    """The machine types of `aws`, `gcp` or `azure`; nothing for a provider without a table."""
    return _TABLES.get(provider, {})


_EC2_SIZES = {
    "large": 2,
    "xlarge": 4,
    "2xlarge": 8,
    "4xlarge": 16,
    "8xlarge": 32,
    "12xlarge": 48,
    "16xlarge": 64,
    "24xlarge": 96,
}
_EC2_GPUS = {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}


def _ec2() -> Iterator[Instance]:
    for family, gib_per_cpu in (("c6i", 2), ("c7i", 2), ("m5", 4), ("m6i", 4), ("m7i", 4), ("r6i", 8), ("r7i", 8)):
        for size, cpus in _EC2_SIZES.items():
            yield Instance(f"{family}.{size}", cpus, cpus * gib_per_cpu)
    for family, gpu, gpu_gib, gib_per_cpu in (("g5", "A10G", 24, 4), ("g6", "L4", 24, 4), ("g6e", "L40S", 48, 8)):
        for size, cpus in {**_EC2_SIZES, "48xlarge": 192}.items():
            if size != "large":
                accelerator = Accelerator(gpu, _EC2_GPUS.get(size, 1), gpu_gib)
                yield Instance(f"{family}.{size}", cpus, cpus * gib_per_cpu, accelerator)
    for size, count in (
        ("xlarge", 1),
        ("2xlarge", 1),
        ("4xlarge", 1),
        ("8xlarge", 1),
        ("12xlarge", 4),
        ("16xlarge", 1),
    ):
        yield Instance(f"g4dn.{size}", _EC2_SIZES[size], _EC2_SIZES[size] * 4, Accelerator("T4", count, 16))
    yield Instance("g4dn.metal", 96, 384, Accelerator("T4", 8, 16))
    yield Instance("p4d.24xlarge", 96, 1152, Accelerator("A100", 8, 40))
    yield Instance("p4de.24xlarge", 96, 1152, Accelerator("A100", 8, 80))
    yield Instance("p5.4xlarge", 16, 256, Accelerator("H100", 1, 80))
    yield Instance("p5.48xlarge", 192, 2048, Accelerator("H100", 8, 80))
    yield Instance("p5e.48xlarge", 192, 2048, Accelerator("H200", 8, 141))
    yield Instance("p5en.48xlarge", 192, 2048, Accelerator("H200", 8, 141))
    yield Instance("p6-b200.48xlarge", 192, 2048, Accelerator("B200", 8, 179))


def _gce() -> Iterator[Instance]:
    for family, sizes in (("e2", (2, 4, 8, 16, 32)), ("n2", (2, 4, 8, 16, 32, 48, 64, 80, 96, 128))):
        for cpus in sizes:
            yield Instance(f"{family}-standard-{cpus}", cpus, cpus * 4)
            if cpus <= (16 if family == "e2" else 128):
                yield Instance(f"{family}-highmem-{cpus}", cpus, cpus * 8)
    for count in (1, 2, 4, 8):
        yield Instance(f"a2-highgpu-{count}g", 12 * count, 85 * count, Accelerator("A100", count, 40))
        yield Instance(f"a2-ultragpu-{count}g", 12 * count, 170 * count, Accelerator("A100", count, 80))
        yield Instance(f"a3-highgpu-{count}g", 26 * count, 234 * count, Accelerator("H100", count, 80))
    yield Instance("a2-megagpu-16g", 96, 1360, Accelerator("A100", 16, 40))
    yield Instance("a3-megagpu-8g", 208, 1872, Accelerator("H100", 8, 80))
    for cpus, count in ((4, 1), (8, 1), (12, 1), (16, 1), (24, 2), (32, 1), (48, 4), (96, 8)):
        yield Instance(f"g2-standard-{cpus}", cpus, cpus * 4, Accelerator("L4", count, 24))


def _azure() -> Iterator[Instance]:
    for cpus in (2, 4, 8, 16, 32, 48, 64, 96):
        yield Instance(f"Standard_D{cpus}s_v5", cpus, cpus * 4)
        yield Instance(f"Standard_E{cpus}s_v5", cpus, 672 if cpus == 96 else cpus * 8)
    for cpus, gib, count in ((4, 28, 1), (8, 56, 1), (16, 110, 1), (64, 440, 4)):
        yield Instance(f"Standard_NC{cpus}as_T4_v3", cpus, gib, Accelerator("T4", count, 16))
    for cpus, count in ((24, 1), (48, 2), (96, 4)):
        yield Instance(f"Standard_NC{cpus}ads_A100_v4", cpus, 220 * count, Accelerator("A100", count, 80))
    for cpus, gib, count in ((36, 440, 1), (72, 880, 2)):
        yield Instance(f"Standard_NV{cpus}ads_A10_v5", cpus, gib, Accelerator("A10", count, 24))
    for cpus, count in ((40, 1), (80, 2)):
        yield Instance(f"Standard_NC{cpus}ad{'i' if count == 2 else ''}s_H100_v5", cpus, 320 * count, _h100(count, 94))
    yield Instance("Standard_ND96asr_v4", 96, 900, Accelerator("A100", 8, 40))
    yield Instance("Standard_ND96amsr_A100_v4", 96, 1900, Accelerator("A100", 8, 80))
    yield Instance("Standard_ND96isr_H100_v5", 96, 1900, _h100(8, 80))


def _h100(count: int, memory_gib: int) -> Accelerator:
    return Accelerator("H100", count, memory_gib)


_TABLES = {
    provider: {instance.name: instance for instance in instances}
    for provider, instances in (("aws", _ec2()), ("gcp", _gce()), ("azure", _azure()))
}
