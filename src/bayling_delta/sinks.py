"""Where a result goes: files of a new directory."""

from pathlib import Path

from bayling_delta.files import FileWriter, direct_writes_pay, sync_directory
from bayling_delta.plan import OutputFile

__all__ = ["DirectorySink"]


class DirectorySink:
    """Writes each output file into a directory, and syncs it when it is whole."""

    def __init__(self, directory: Path, output_bytes: int, *, direct: bool = True) -> None:
        """``output_bytes`` come in all; with ``direct`` they pass by the page cache where that is the faster way."""
        self._directory = directory
        self._output_bytes = output_bytes
        self._direct = direct
        self._tried = False
        self._writer: FileWriter | None = None

    def begin(self, file: OutputFile) -> None:
        """Create the file at its full size."""
        if self._direct and not self._tried:
            self._direct = direct_writes_pay(self._directory, self._output_bytes)
            self._tried = True
        self._writer = FileWriter(self._directory / file.name, file.size, direct=self._direct)

    def write(self, buffer: memoryview, offset: int, count: int) -> None:
        """Write the file's next bytes."""
        self._open_writer().write(buffer, offset, count)

    def end(self) -> None:
        """Sync the file and its name, and close it."""
        self._open_writer().finish()
        self.close()
        sync_directory(self._directory)

    def close(self) -> None:
        """Close what a failed run left open."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _open_writer(self) -> FileWriter:
        if self._writer is None:
            raise RuntimeError("bytes were given before their file was begun")
        return self._writer
