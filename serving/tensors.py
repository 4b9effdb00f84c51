"""A safetensors file in memory as tensors, without copying: views of the bytes that were read.

https://github.com/huggingface/safetensors#format: 8 bytes with the length of the header (little endian), the header
(JSON: name -> dtype, shape, data_offsets), the data. The library's own `load` copies every tensor, 7 to 9 ms for the
20 MB of an adapter, as long as all the rest of laying it out.
"""

import math

import msgspec
import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LENGTH_BYTES, HEADER_BYTES = 8, 4 << 20


class Torn(Exception):
    """Not a whole safetensors file of floating-point tensors; says what is wrong."""


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def parse(buffer: bytearray) -> dict[str, torch.Tensor]:
    """{name: view of `buffer`}, which must not change any more; raises `Torn`.

    Every byte of the data belongs to exactly one tensor, as the format demands: a cut or lengthened file is found out.
    """
    entries, start = _header(buffer)
    _check(entries, len(buffer) - start)
    data = torch.frombuffer(buffer, dtype=torch.uint8)[start:]
    return {name: _view(data, entry) for name, entry in entries.items()}


def _check(entries: dict[str, _Entry], length: int) -> None:
    """Raises `Torn` unless the tensors, one behind the other, are exactly the data."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != at or end != begin + _bytes(name, entry):
            raise Torn(f"tensor {name!r} of {entry.dtype} {entry.shape} cannot be bytes {begin} to {end} of the data")
        at = end
    if at != length:
        raise Torn(f"{length} bytes of data instead of {at}")


def _header(buffer: bytearray) -> tuple[dict[str, _Entry], int]:
    """The entries, and where the data begins."""
    length = int.from_bytes(buffer[:LENGTH_BYTES], "little")
    start = LENGTH_BYTES + length
    if length > HEADER_BYTES or start > len(buffer):
        raise Torn(f"a header of {length} bytes in a file of {len(buffer)}")
    try:
        raw = msgspec.json.decode(memoryview(buffer)[LENGTH_BYTES:start], type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        return {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}, start
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Torn(f"a bad header: {error}") from None


def _bytes(name: str, entry: _Entry) -> int:
    if entry.dtype not in DTYPES:
        raise Torn(f"tensor {name!r} is {entry.dtype}, not one of {', '.join(DTYPES)}")
    if min(entry.shape, default=0) < 0:
        raise Torn(f"tensor {name!r} has the shape {entry.shape}")
    return math.prod(entry.shape) * DTYPES[entry.dtype].itemsize


def _view(data: torch.Tensor, entry: _Entry) -> torch.Tensor:
    """A header of odd length leaves the data at an odd address: then, and only then, it is copied."""
    part, dtype = data[slice(*entry.data_offsets)], DTYPES[entry.dtype]
    aligned = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
    return aligned.view(dtype).view(entry.shape)
