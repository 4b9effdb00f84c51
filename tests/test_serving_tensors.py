"""safetensors files as views of their bytes: what the library writes is read, what is torn is said to be."""

import json

import pytest
import torch
from safetensors.torch import save

from serving.tensors import Torn, parse


def file_of(header: object, data: bytes = b"", pad: int = 0) -> bytearray:
    """Length, header, data; `pad` spaces behind the header move the data."""
    text = json.dumps(header).encode() + b" " * pad
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_the_library_writes_is_read(dtype: torch.dtype) -> None:
    """Every floating-point type, a scalar and an empty tensor, with metadata, without a copy."""
    tensors = {"b": torch.randn(5, 3), "a": torch.randn(2, 7), "c": torch.tensor(4.0), "d": torch.zeros(0, 3)}
    buffer = bytearray(save({name: tensor.to(dtype) for name, tensor in tensors.items()}, {"format": "pt"}))
    found = parse(buffer)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in tensors.items()}
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in tensors.items())
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


@pytest.mark.parametrize("pad", range(4))
def test_data_may_begin_at_an_odd_address(pad: int) -> None:
    """A writer need not pad the header."""
    values = torch.tensor([1.5, -2.0])
    buffer = file_of({"x": entry(0, 8, [2])}, values.numpy().tobytes(), pad)
    assert torch.equal(parse(buffer)["x"], values)


@pytest.mark.parametrize(
    ("buffer", "said"),
    [
        (b"", "a header"),
        (b"\x80\x04pickle", "a header"),
        ((2**63).to_bytes(8, "little") + b"{}", "a header"),
        (b"\x02\0\0\0\0\0\0\0[]", "a bad header"),
        (b"\x02\0\0\0\0\0\0\0\xff\xff", "a bad header"),
        (file_of({"x": {"dtype": "F32"}}), "a bad header"),
        (file_of({"x": entry(0, 8, [2])}, b"1234567"), "7 bytes of data instead of 8"),
        (file_of({"x": entry(0, 8, [2])}, b"123456789"), "9 bytes of data instead of 8"),
        (file_of({"x": entry(0, 8, [3])}, b"12345678"), "cannot be bytes 0 to 8"),
        (file_of({"x": entry(4, 8, [1])}, b"12345678"), "cannot be bytes 4 to 8"),
        (file_of({"x": entry(0, 8, [2]), "y": entry(4, 8, [1])}, b"12345678"), "cannot be bytes 4 to 8"),
        (file_of({"x": entry(-8, 0, [2])}, b"12345678"), "cannot be bytes -8 to 0"),
        (file_of({"x": entry(0, 8, [-1, -2])}, b"12345678"), "the shape"),
        (file_of({"x": entry(0, 8, [1], "I64")}, b"12345678"), "I64"),
    ],
)
def test_what_is_torn_is_said_to_be(buffer: bytes, said: str) -> None:
    """Cut, lengthened, overlapping, with holes, of integers, or something else altogether."""
    with pytest.raises(Torn, match=said):
        parse(bytearray(buffer))


def test_every_cut_is_found_out() -> None:
    """Wherever a file ends too early."""
    whole = save({"a": torch.randn(3, 2), "b": torch.randn(2, 2).half()})
    assert len(parse(bytearray(whole))) == 2
    for length in range(len(whole)):
        with pytest.raises(Torn):
            parse(bytearray(whole[:length]))
