"""What is published about GPUs, and what follows from it. Nothing here was measured.

A prediction is the larger of two times for a parameter: that of its bytes at the published bandwidth of memory, and
that of its instructions, each scheduler of each multiprocessor issuing one for 32 lanes in every cycle of the published
boost clock. Both flatter the GPU: a copy reaches about 90 % of the bandwidth, and no kernel issues in every cycle;
sm_75 and sm_80 besides have FP32 units for half a warp a cycle. So it says which limit a kernel is nearer to, and what
no measurement will undercut.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
_REGISTERS = 65_536  # a multiprocessor, at every architecture here
_REGISTER_UNIT = 256  # registers are given to a warp in multiples of this
_SHARED_UNIT = 256


@dataclass(frozen=True)
class Multiprocessor:
    """Published limits of residency (CUDA programming guide, technical specifications by compute capability)."""

    threads: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int  # of shared memory, for each block

    def resident(self, registers: int, threads: int, shared_bytes: int) -> tuple[int, str]:
        """How many blocks of threads fit, and what the limit is."""
        warps = -(-threads // WARP)
        a_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
        shared = -(-(shared_bytes + self.reserved_bytes) // _SHARED_UNIT) * _SHARED_UNIT
        limits = {
            "registers": _REGISTERS // a_warp // warps,
            "threads": self.threads // (warps * WARP),
            "blocks": self.blocks,
            "shared memory": self.shared_bytes // shared if shared else self.blocks,
        }
        limit = min(limits, key=lambda name: limits[name])
        return limits[limit], limit


@dataclass(frozen=True)
class Gpu:
    """Published figures (the vendor's data sheets and architecture papers): one product of its class."""

    name: str
    arch: int  # whose code is counted
    gigabytes_a_second: float
    multiprocessors: int
    boost_gigahertz: float
    schedulers: int = 4  # a multiprocessor

    def memory_ns(self, bytes_moved: float) -> float:
        """The time of so many bytes."""
        return bytes_moved / self.gigabytes_a_second

    def issue_ns(self, instructions: float) -> float:
        """The time of so many instructions of a thread."""
        return instructions / (self.multiprocessors * self.schedulers * self.boost_gigahertz * WARP)


_KB = 1024
MULTIPROCESSORS = {
    75: Multiprocessor(1024, 16, 64 * _KB, 0),
    80: Multiprocessor(2048, 32, 164 * _KB, _KB),
    86: Multiprocessor(1536, 16, 100 * _KB, _KB),
    89: Multiprocessor(1536, 24, 100 * _KB, _KB),
    90: Multiprocessor(2048, 32, 228 * _KB, _KB),
    100: Multiprocessor(2048, 32, 228 * _KB, _KB),
    120: Multiprocessor(1536, 24, 100 * _KB, _KB),
}

GPUS = (
    Gpu("T4", 75, 320, 40, 1.59),
    Gpu("V100-class", 75, 900, 80, 1.53),  # SXM2; ptxas makes no more code for sm_70, so sm_75's is counted
    Gpu("A100", 80, 2039, 108, 1.41),  # SXM, 80 GB
    Gpu("RTX 4090", 89, 1008, 128, 2.52),
    Gpu("H100", 90, 3350, 132, 1.98),  # SXM5
    Gpu("H200", 90, 4800, 132, 1.98),
    Gpu("B200", 100, 8000, 148, 1.965),
)
