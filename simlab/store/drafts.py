"""A file that HDF5 can always close: what a shard is written through.

HDF5 cannot close a file on a disk that is full, and takes the process down at exit (seen with
2.0.0). So it is given this object in place of a name. Large blocks, which are the values of fields,
go to the disk as they come, from where they are. Small ones, which are everything else, are kept
in memory by pages and written last: until then the file is none. What the disk refuses is kept in
memory too and HDF5 goes on as if nothing had happened; :meth:`Draft.check` tells.
"""

from __future__ import annotations

import os

from simlab.store import files

__all__ = ["Draft"]

_PAGE = 1 << 12
_LARGE = 1 << 14


class Draft:
    """What h5py writes to in place of a file; a file-like object.

    Parameters
    ----------
    fd : int
        An empty file, open for reading and writing; stays open.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = self._size = 0
        self._pages: dict[int, bytearray] = {}
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raise what the disk has refused, if anything."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Write what was kept, after HDF5 has closed the file. The file is synced."""
        self.check()
        numbers = sorted(self._pages)
        first = 0
        for last in range(1, len(numbers) + 1):
            if last == len(numbers) or numbers[last] != numbers[last - 1] + 1:
                run = b"".join(self._pages[number] for number in numbers[first:last])
                files.write_at(self._fd, run, numbers[first] * _PAGE)
                first = last
        files.truncate(self._fd, self._size)
        files.sync(self._fd)

    # what h5py calls; nothing here may raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, from the start or from the end."""
        self._at = offset + (self._size if whence == os.SEEK_END else 0)
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def write(self, data: memoryview) -> int:
        """Write at the position."""
        view = memoryview(data).cast("B")
        first, last = self._at, self._at + len(view)
        is_written = False
        if len(view) >= _LARGE and self._error is None:
            try:
                files.write_at(self._fd, view, first)
                is_written = True
            except BaseException as error:  # also an interrupt: HDF5 has to end in order
                self._error = error
        for number in range(first // _PAGE, -(-last // _PAGE)):
            if is_written and number not in self._pages:
                continue
            at = number * _PAGE
            begin, end = max(first, at), min(last, at + _PAGE)
            self._page(number)[begin - at : end - at] = view[begin - first : end - first]
        self._at, self._size = last, max(self._size, last)
        return len(view)

    def readinto(self, data: memoryview) -> int:
        """Read at the position; zeros where nothing was written."""
        view = memoryview(data).cast("B")
        first, last = self._at, self._at + len(view)
        n = files.read_at(self._fd, view, first)
        view[n:] = bytes(len(view) - n)
        for number in range(first // _PAGE, -(-last // _PAGE)):
            page = self._pages.get(number)
            if page is not None:
                at = number * _PAGE
                begin, end = max(first, at), min(last, at + _PAGE)
                view[begin - first : end - first] = page[begin - at : end - at]
        self._at = last
        return len(view)

    def read(self, size: int) -> bytes:
        """Return bytes from the position on."""
        data = bytearray(size)
        self.readinto(memoryview(data))
        return bytes(data)

    def truncate(self, size: int) -> int:
        """Set the size of the file."""
        self._size = size
        self._pages = {n: page for n, page in self._pages.items() if n * _PAGE < size}
        return size

    def flush(self) -> None:
        """Do nothing: :meth:`finish` writes."""

    def _page(self, number: int) -> bytearray:
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = bytearray(_PAGE)
            files.read_at(self._fd, memoryview(page), number * _PAGE)
        return page
