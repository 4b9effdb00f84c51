"""`python -m daemon.ingest.child TASK`: parses the file on its standard input under limits (see `sandbox`)."""

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterator

import msgspec

from daemon.config import Watch
from daemon.ingest import documents, packed, structured
from daemon.ingest.problem import Problem
from daemon.ingest.prose import Located
from daemon.ingest.sandbox import Done, Found, Task

MEMORY_BYTES = 1024 * 1024 * 1024
"""Of address space: the parsers map more than they use. What a document may unpack to is bounded before that."""
CPU_SECONDS = 45
ANSWER_RATIO = 4
"""What is found may be so many times as large as the largest file: headings are repeated with every chunk."""
Reader = Callable[[int, Watch], Iterator[Located]]
READERS: dict[str, Reader] = {
    "json": structured.read_json, "yaml": structured.read_yaml, "yml": structured.read_yaml,
    "csv": structured.read_csv, "tsv": structured.read_tsv, "html": documents.read_html, "htm": documents.read_html,
    "epub": documents.read_epub, "docx": documents.read_docx, "pdf": documents.read_pdf,
}  # fmt: skip


def limit(file_bytes: int) -> None:
    """Give up what a parser does not need: memory, time, files to write, the network."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    # a name space without any network; where the kernel forbids it, no parser here knows how to fetch anything anyway
    user_and_network = 0x1000_0000 | 0x4000_0000  # CLONE_NEWUSER | CLONE_NEWNET, unshare(2)
    ctypes.CDLL(None, use_errno=True).unshare(user_and_network)


def read(descriptor: int, task: Task) -> Iterator[Located]:
    """The examples of a file in one of the formats of this process."""
    inner, _, packing = task.suffix.rpartition(".")
    if packing in packed.UNPACKERS:
        unpacked = packed.unpack(descriptor, packing, task.watch.file_bytes_max)
        return packed.READERS[inner](unpacked, task.watch)
    return READERS[task.suffix](descriptor, task.watch)


def main() -> None:
    """Read the task, read the file, say what was found."""
    task = msgspec.json.decode(sys.argv[1], type=Task)
    limit(ANSWER_RATIO * task.watch.file_bytes_max)
    encoder, found = msgspec.json.Encoder(), 0
    with os.fdopen(os.dup(1), "wb") as answer:
        try:
            for example, line in read(0, task):
                answer.write(encoder.encode(Found(example, line)) + b"\n")
                found += 1
            done = Done(found)
        except Problem as problem:
            done = Done(found, problem.code, problem.message[:4096], problem.line, problem.byte_offset)
        except (MemoryError, RecursionError):
            done = Done(found, "too_large", "the document needs more memory than a parser may use: split it")
        answer.write(encoder.encode(done) + b"\n")


if __name__ == "__main__":
    main()
