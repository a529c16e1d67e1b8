"""The machines that a plan is for, and what is assumed of them beside their data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.accelerators import Accelerator

# What the driver, NCCL and the libraries' work spaces take of a GPU beside torch's tensors, and
# what an interpreter with torch and DeepSpeed takes of a host's memory. Assumed, not measured here.
GPU_RUNTIME, CPU_RUNTIME = 2e9, 0.5e9
# Share of the tensors' peak that the allocator loses between them. Assumed.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Range:
    """A low and a high value: a prediction's, or an efficiency's."""

    low: float
    high: float

    def __truediv__(self, other: float) -> Range:
        return Range(self.low / other, self.high / other)


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices."""

    kind: str
    device: Accelerator
    devices: int
    per_node: int
    host_memory: float
    """Bytes of a node's own memory, for what is offloaded and for copies of checkpoints."""

    @property
    def on_cpu(self) -> bool:
        """Whether its ranks are CPU cores."""
        return not self.device.device_name

    @property
    def nodes(self) -> int:
        """Whole ones."""
        return -(-self.devices // self.per_node)

    @property
    def on_node(self) -> int:
        """Devices of the fullest node."""
        return min(self.devices, self.per_node)

    @property
    def bandwidth(self) -> float:
        """Bytes/s at which a ring of all ranks moves a message."""
        if self.nodes == 1:
            return self.device.link
        return min(self.device.link, self.device.network)

    def needs(self, tensors: int) -> int:
        """Bytes of a device's memory for a peak of `tensors` bytes."""
        runtime = CPU_RUNTIME if self.on_cpu else GPU_RUNTIME
        return int(tensors * (1 + FRAGMENTATION) + runtime)

    def fits(self, tensors: int) -> bool:
        """Whether a peak of `tensors` bytes fits a device."""
        return self.needs(tensors) <= self.device.memory

    def holds_on_host(self, host: int) -> bool:
        """Whether a rank's `host` bytes fit its share of a node's own memory."""
        return host * self.on_node <= self.host_memory

    def of(self, devices: int) -> Cluster:
        """The same with another number of devices."""
        return replace(self, devices=devices)
