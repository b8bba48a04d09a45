"""The pixel data of a DICOM file, a frame at a time: how many frames there are, and each one's decoded values."""

import struct
from pathlib import Path
from typing import Iterator

import numpy as np

from uscl_hub.clips.clip import UnreadableClip, check_pixels

_ITEM, _END = 0xFFFEE000, 0xFFFEE0DD
_SLACK = 65536  # bytes of headers that a compressed frame may have beyond what its raw pixels take
_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ")  # of JPEG and JPEG-LS, JPEG 2000, JP2


class PixelData:
    """file: open and at the pixel data's tag. size: of the file, in bytes. data: the other attributes."""

    def __init__(self, file, size: int, data, path: Path, syntax: str):
        self.file, self.data, self.path, self.syntax = file, data, path, syntax
        self.uid = data.file_meta.TransferSyntaxUID
        self.encapsulated = self.uid.is_encapsulated
        self.photometric = str(data.PhotometricInterpretation)
        self.samples = int(data.SamplesPerPixel)
        self.pixels = int(data.Rows) * int(data.Columns)
        self.raw = (self.pixels * self.samples * int(data.BitsAllocated) + 7) // 8  # bytes of a frame
        order = "<" if self.uid.is_little_endian else ">"
        implicit = self.uid.is_implicit_VR
        header = file.read(8 if implicit else 12)
        if struct.unpack(f"{order}HH", header[:4]) != (0x7FE0, 0x0010):
            raise UnreadableClip(path, "a DICOM file without pixel data")
        length = struct.unpack(f"{order}L", header[-4:])[0]
        self.start = file.tell()
        self.end = size if length == 0xFFFFFFFF else min(size, self.start + length)
        self.items = self._walk() if self.encapsulated else []
        self.total = sum(length for _, length in self.items[1:]) if self.encapsulated else self.end - self.start
        self.groups: list[list[int]] = []  # of items, a frame each

    def _walk(self) -> list[tuple[int, int]]:
        """Offset and length of every item; the first is the offset table."""
        items: list[tuple[int, int]] = []
        at = self.start
        while at + 8 <= self.end:
            self.file.seek(at)
            group, element, length = struct.unpack("<HHL", self.file.read(8))
            tag = group << 16 | element
            if tag == _END:
                break
            if tag != _ITEM or length == 0xFFFFFFFF or at + 8 + length > self.end:
                if not items[1:]:
                    raise UnreadableClip(self.path, f"pixel data cannot be decoded ({self.syntax}, damaged)")
                break  # cut off: what is whole counts
            items.append((at + 8, length))
            at += 8 + length
        return items

    def fragments(self) -> Iterator[bytes]:
        for item in self.items[1:]:
            yield self._read(item)

    def _read(self, item: tuple[int, int]) -> bytes:
        self.file.seek(item[0])
        return self.file.read(item[1])

    def count(self, claimed: int) -> int:
        """Frames in the file. Raises UnreadableClip if they are fewer than `claimed`."""
        if self.encapsulated:
            self.groups = self._grouped(claimed)
            found = len(self.groups)
        else:
            self.raw = self._native_frame_bytes(claimed)
            found = (self.total if claimed else self.total // self.raw * self.raw) // self.raw
            if claimed and self.total + 1 < claimed * self.raw:
                found = self.total // self.raw
        if found < max(1, claimed):
            raise UnreadableClip(
                self.path, f"pixel data cannot be decoded ({self.syntax}, {found} of {max(1, claimed)} frames)"
            )
        return found

    def _native_frame_bytes(self, claimed: int) -> int:
        if int(self.data.BitsAllocated) % 8 and self.pixels * self.samples % 8 and claimed != 1:
            raise UnreadableClip(self.path, "frames of single bits that do not end at a byte: not supported")
        packed = self.pixels * 2
        if self.samples != 3 or self.photometric not in ("YBR_FULL_422", "YBR_PARTIAL_422") or self.raw % 3:
            return self.raw
        if claimed:  # data of full length are found under this tag, too
            return self.raw if self.total >= claimed * self.raw else packed
        return self.raw if self.total % self.raw <= 1 and self.total % packed > 1 else packed

    def _grouped(self, claimed: int) -> list[list[int]]:
        """The items of each frame: by the offset table, else by where a compressed picture begins."""
        fragments = range(1, len(self.items))
        if not fragments:
            return []
        if starts := self._table():
            where = {self.items[i][0] - 8 - (self.items[1][0] - 8): i for i in fragments}
            if starts[0] == 0 and starts == sorted(set(starts)) and all(start in where for start in starts):
                firsts = [where[start] for start in starts]
                if len(firsts) == claimed or len(firsts) > 1 or len(fragments) == 1:
                    return [list(range(a, b)) for a, b in zip(firsts, [*firsts[1:], len(self.items)])]
        if len(fragments) == claimed or self.uid.endswith("1.2.5"):  # RLE: a fragment a frame
            return [[i] for i in fragments]
        begins = []
        for i in fragments:
            self.file.seek(self.items[i][0])
            if self.file.read(8).startswith(_STARTS):
                begins.append(i)
        if not begins or begins[0] != 1:
            return [list(fragments)] if claimed == 1 else [[i] for i in fragments]
        return [list(range(a, b)) for a, b in zip(begins, [*begins[1:], len(self.items)])]

    def _table(self) -> list[int]:
        extended = self.data.get("ExtendedOffsetTable")
        if isinstance(extended, bytes) and extended:
            return [n for (n,) in struct.iter_unpack("<Q", extended[: len(extended) // 8 * 8])]
        table = self._read(self.items[0])
        return [n for (n,) in struct.iter_unpack("<L", table[: len(table) // 4 * 4])]

    def frame(self, index: int) -> np.ndarray:
        """(H, W) or (H, W, 3): one frame's decoded values, RGB if there are three."""
        from pydicom.encaps import encapsulate
        from pydicom.pixels import pixel_array

        data = self.data
        if not self.encapsulated:
            content = self._read((self.start + index * self.raw, self.raw))
            if self.samples == 3 and self.photometric in ("YBR_FULL_422", "YBR_PARTIAL_422"):
                return self._luma(content)
        else:
            group = self.groups[index]
            length = sum(self.items[i][1] for i in group)
            if length > 1.1 * self.raw + _SLACK:
                raise UnreadableClip(self.path, f"a compressed frame of {length} bytes, more than its pixels take")
            content = b"".join(self._read(self.items[i]) for i in group)
            data.PhotometricInterpretation = self._checked(content)
            content = encapsulate([content], has_bot=False)
        data.NumberOfFrames = 1
        for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
            data.pop(name, None)
        data.add_new(0x7FE00010, "OB" if self.encapsulated or int(data.BitsAllocated) <= 8 else "OW", content)
        data["PixelData"].is_undefined_length = self.encapsulated
        return pixel_array(data)

    def _luma(self, content: bytes) -> np.ndarray:
        """Brightness of YCbCr pixels as they are stored, two for one pair of colours, or each with its own."""
        rows, columns = int(self.data.Rows), int(self.data.Columns)
        values = np.frombuffer(content, np.uint8)
        if self.raw == 2 * self.pixels:
            luma = values.reshape(-1, 4)[:, :2].reshape(rows, columns)
        elif int(self.data.get("PlanarConfiguration") or 0):
            luma = values.reshape(3, rows, columns)[0]
        else:
            luma = values.reshape(rows, columns, 3)[..., 0]
        if self.photometric == "YBR_PARTIAL_422":  # 16 is black, 235 white
            luma = np.rint((luma.astype(np.float32) - 16) * (255 / 219)).clip(0, 255).astype(np.uint8)
        return luma

    def _checked(self, content: bytes) -> str:
        """The colours that a compressed frame is in. Its own size must keep the limits and be what the tags say."""
        rows, columns = int(self.data.Rows), int(self.data.Columns)
        try:
            found = _codestream(content)
        except (struct.error, IndexError):  # cut off: the decoder says so
            found = None
        if found is None:
            return self.photometric
        width, height, subsampled = found
        check_pixels(self.path, width, height)
        if (width, height) != (columns, rows):
            raise UnreadableClip(self.path, f"a frame of {width} x {height} pixels in a file of {columns} x {rows}")
        if self.samples == 3 and (subsampled and self.photometric == "RGB" or self.photometric.startswith("YBR_PART")):
            return "YBR_FULL_422" if content.startswith(b"\xff\xd8") else "YBR_ICT"
        return self.photometric


def _codestream(content: bytes) -> tuple[int, int, bool] | None:
    """Width, height, and whether colours have fewer pixels (so that they cannot be RGB) by a JPEG's, JPEG-LS's or
    JPEG 2000's own header; None for another content."""
    at = 2
    if content[:12] == _STARTS[2]:
        if b"\xff\x4f\xff\x51" not in content:
            return None
        at = content.index(b"\xff\x4f\xff\x51") + 2
    elif content[:4] != _STARTS[1]:
        return _jpeg(content)
    right, bottom, left, top = struct.unpack(">LLLL", content[at + 6 : at + 22])
    return right - left, bottom - top, False


def _jpeg(content: bytes) -> tuple[int, int, bool] | None:
    if content[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 4 <= len(content):
        if content[at] != 0xFF:
            return None
        marker = content[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
            height, width, components = struct.unpack(">HHB", content[at + 5 : at + 10])
            sampling = {content[at + 11 + 3 * i] for i in range(components)}
            return width, height, len(sampling) > 1
        at += 2 + struct.unpack(">H", content[at + 2 : at + 4])[0]
    return None
