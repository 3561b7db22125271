"""TPUs, by the names that JAX gives them."""

import dataclasses

LANES = 128
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore.

    Attributes:
      name: generation.
      vmem: on-chip memory in bytes.
      mxu: width of its matrix units.
      cores: how many of them share a device (megacore).
    """

    name: str
    vmem: int
    mxu: int
    cores: int = 1

    @property
    def vmem_limit(self) -> int:
        """Bytes that a kernel may use; the rest is left to the compiler."""
        return self.vmem - self.vmem // 16


UNKNOWN_CHIP = Chip("unknown", 16 * MIB, 128)  # the least able one
CHIPS = {
    kind: chip
    for chip, kinds in (
        (Chip("v4", 16 * MIB, 128, cores=2), ("TPU v4",)),
        (Chip("v5e", 128 * MIB, 128), ("TPU v5e", "TPU v5 lite")),
        (Chip("v5p", 64 * MIB, 128, cores=2), ("TPU v5p", "TPU v5")),
        (Chip("v6e", 128 * MIB, 256), ("TPU v6e", "TPU v6 lite")),
        (Chip("TPU7x", 64 * MIB, 256), ("TPU7x", "TPU7")),
    )
    for kind in kinds
}


def chip_of(device_kind: str | None) -> Chip:
    """The chip of a device kind as JAX names it; the least able one where it is not known."""
    return CHIPS.get(device_kind or "", UNKNOWN_CHIP)
