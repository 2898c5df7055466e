"""The keys of patients: keyed hashes of the identifiers that tables and DICOM headers hold.

Plain hashes of such short numbers can be reversed by trying all numbers. HMAC-SHA256 (RFC 2104)
needs a secret, which stays with the owner of the data: in the user's configuration folder, or in
the file that `--patient_key` names. It is read, or made, only when an identifier is to be hashed.
"""

import hmac
import os
import re
import secrets
import unicodedata
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from xrai.errors import UserError
from xrai.files import read_once, write_atomically
from xrai.log import get_logger
from xrai.store import disk_path

_MIN_BYTES, _MAX_BYTES = 16, 4096
_OPTION = "--patient_key FILE or XRAI_PATIENT_KEY"
_logger = get_logger(__name__)


def normal_identifier(identifier: str) -> str:
    """An identifier as it is hashed: accents composed (NFC), and one space between its parts."""
    return " ".join(unicodedata.normalize("NFC", identifier).split())


def loose_identifier(identifier: str) -> str:
    """The same without case and without the .0 that spreadsheets append to numbers: two that are
    equal in this form alone may be one patient.
    """
    return re.sub(r"(?<=\d)\.0$", "", normal_identifier(identifier).casefold())


class PatientKey:
    """The secret in the file `name`, else in `patient.key` in $XDG_CONFIG_HOME/xrai or
    ~/.config/xrai. Where there is none, one is made, unless `may_make` is false.
    """

    def __init__(self, name: str = "", *, may_make: bool = True) -> None:
        self._name, self._may_make = name, may_make

    def hash(self, identifier: str, *, group: str) -> str:
        """The key of a patient whom a table or a header names: always the same, without the name,
        of identifiers that are the same by `normal_identifier`.

        Raises `UserError` where the secret can be neither read nor made.
        """
        data = normal_identifier(identifier).encode(errors="surrogatepass")
        digest = hmac.digest(self._secret, data, "sha256")
        return f"{group}:{digest.hex()[:16]}"

    @property
    def id(self) -> str:
        """A text that tells keys apart and reveals nothing; "" where no identifier was hashed."""
        if "_secret" not in self.__dict__:
            return ""
        return hmac.digest(self._secret, b"id of xrai's patient key", "sha256").hex()[:8]

    def existing_id(self) -> str:
        """The same of a secret that is there, used or not; "" where it cannot be read."""
        with suppress(OSError, UserError):
            if self.path.exists():
                self.hash("", group="")
        return self.id

    @cached_property
    def path(self) -> Path:
        """The file. Raises `UserError` where none is named and the user has no home folder."""
        if self._name:
            return disk_path(self._name, flag=_OPTION)
        try:
            folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        except RuntimeError as error:
            raise UserError(
                "no home folder for the key that patients' identifiers are hashed with: name a "
                f"file by {_OPTION}"
            ) from error
        return Path(folder, "xrai", "patient.key")

    @cached_property
    def _secret(self) -> bytes:
        try:
            if self._may_make and not self.path.exists():
                self._make()
            secret = read_once(self.path, max_bytes=_MAX_BYTES + 1).strip()
        except OSError as error:
            raise UserError(
                f"patients' identifiers are hashed with a key, and the file {self.path} for it "
                f"cannot be read or made ({error.strerror}); name one by {_OPTION}"
            ) from error
        if not _MIN_BYTES <= len(secret) <= _MAX_BYTES:
            advice = f"name a file by {_OPTION}"
            if self.path.is_file():
                advice = "remove it, and a new one is made"
            raise UserError(
                f"{self.path} is no key to hash patients' identifiers with: it takes "
                f"{_MIN_BYTES} to {_MAX_BYTES} bytes; {advice}"
            )
        return secret

    def _make(self) -> None:
        secret = f"{secrets.token_hex(32)}\n".encode()
        try:
            write_atomically(self.path, secret, only_if_absent=True, mode=0o600)
        except FileExistsError:  # another job has just made it
            return
        _logger.info(
            "made the key that patients' identifiers are hashed with: %s; keep it, and give it to "
            "all jobs that make this data set (%s)",
            self.path,
            _OPTION,
        )
