"""Where an image lies so that the shifted rows which a convolution reads are plain rows of memory."""

from dataclasses import dataclass

LINE, PAGE = 64, 4096
"""Bytes of a cache line and of a page."""


def row_length(batch: int, itemsize: int) -> int:
    """The numbers from one row of so many to the next, so that rows start on cache lines and spread over the sets of the cache."""
    line = LINE // itemsize
    if batch < line:
        return batch
    length = -(-batch // line) * line
    return length + line if length * itemsize % PAGE == 0 else length


@dataclass(frozen=True)
class Frame:
    """An image with zeros round it, its batch innermost, cut into phases where a convolution strides.

    Of each channel, phase (p, q) holds the places (h * SH + p, w * SW + q) of the padded image as ``high`` x ``wide`` rows of
    the batch. A stride is so turned into a step of one within each phase.
    """

    top: int
    """Rows of zeros above the image; below 0: rows of the image that are left out."""
    left: int
    phases: tuple[int, int]
    high: int
    wide: int
    spare: int = 0
    """Unused rows after each channel, so that the channels do not all meet in the same sets of the cache."""

    @property
    def rows(self) -> int:
        """Rows of the batch for each channel."""
        return self.phases[0] * self.phases[1] * self.high * self.wide + self.spare

    def row(self, phase: tuple[int, int], h: int, w: int) -> int:
        """The row of a channel in which a place of a phase lies."""
        return ((phase[0] * self.phases[1] + phase[1]) * self.high + h) * self.wide + w

    def spread(self, batch: int, itemsize: int = 4) -> "Frame":
        """The same with as many spare rows as keep channels off page strides."""
        row_bytes = batch * itemsize
        plain = Frame(self.top, self.left, self.phases, self.high, self.wide)
        if not row_bytes or plain.rows * row_bytes < PAGE:
            return plain
        for spare in range(PAGE // LINE):
            beyond = (plain.rows + spare) * row_bytes % PAGE
            if LINE <= beyond <= PAGE // 4 or PAGE - PAGE // 4 <= beyond <= PAGE - LINE:
                return Frame(self.top, self.left, self.phases, self.high, self.wide, spare)
        return plain
