"""A bucket without a network for the fast tests: a folder whose files a reader may not use in
place.
"""

import hashlib
import time
from pathlib import Path

from xrai.errors import UnreachableError
from xrai.store import FolderStore


class RemoteFolder(FolderStore):
    """Counts its downloads in a file, so that those of other processes count too. Picklable.

    Downloads of keys that contain `slow_key` wait until the file `<folder>.open` is there, those of
    `failing` keys raise, those of `flipped` keys arrive with a wrong byte: the first `num_bad`
    times, all processes together.
    """

    def __init__(
        self,
        folder: Path,
        *,
        slow_key: str = "\0",
        failing: str = "\0",
        flipped: str = "\0",
        num_bad: int = 10**9,
    ) -> None:
        super().__init__(folder)
        self.log = folder.with_name(f"{folder.name}.downloads")
        self._slow_key, self._failing, self._flipped, self._num_bad = (
            slow_key,
            failing,
            flipped,
            num_bad,
        )

    def local_path(self, key: str) -> Path | None:
        return None

    def download(self, key: str, path: Path) -> str:
        with self.log.open("a") as log:
            log.write(f"{key}\n")
        bad = self.num_downloads(key) <= self._num_bad
        while self._slow_key in key and not self._gate.exists():
            time.sleep(0.01)
        if self._failing in key and bad:
            raise UnreachableError(f"{self.uri}/{key} cannot be read: nobody answers")
        digest = super().download(key, path)
        if self._flipped in key and bad:
            flip_byte(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return digest

    def open_gate(self) -> None:
        """Let the slow downloads go on."""
        self._gate.touch()

    def close_gate(self) -> None:
        """Let the slow downloads wait again."""
        self._gate.unlink(missing_ok=True)

    def downloads(self) -> list[str]:
        """The keys of the downloads that have begun, in order."""
        return self.log.read_text().split() if self.log.exists() else []

    def num_downloads(self, key: str = "") -> int:
        """How many downloads of keys that contain `key` have begun."""
        return sum(key in begun for begun in self.downloads())

    @property
    def _gate(self) -> Path:
        return Path(f"{self.uri}.open")


def flip_byte(path: Path, place: int | None = None) -> None:
    """Change one byte of a file, in the middle or at a place, without a trace in its size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 0x10
    path.write_bytes(data)
