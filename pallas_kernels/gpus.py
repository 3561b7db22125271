"""NVIDIA GPUs, by the names that JAX gives them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the tables of kernels need of a GPU.

    Attributes:
      capability: compute capability times ten: 90.
      processors: multiprocessors.
    """

    capability: int
    processors: int

    @property
    def architecture(self) -> str:
        """The capability as compilers write it: "sm_90"."""
        return f"sm_{self.capability}"

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a CTA may use."""
        return {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}.get(self.capability, 99 << 10)


KNOWN = {
    "A30": Gpu(80, 56),
    "A100": Gpu(80, 108),
    "A800": Gpu(80, 108),
    "H20": Gpu(90, 78),
    "H100": Gpu(90, 132),
    "H200": Gpu(90, 132),
    "H800": Gpu(90, 132),
    "GH200": Gpu(90, 132),
    "B200": Gpu(100, 148),
    "GB200": Gpu(100, 152),
    "B300": Gpu(103, 148),
    "GB300": Gpu(103, 152),
}


def find(kind: str | None) -> Gpu | None:
    """The GPU of a device kind such as "NVIDIA A100-SXM4-80GB"; None if it is not known."""
    return next((KNOWN[word] for word in (kind or "").replace("-", " ").split() if word in KNOWN), None)
