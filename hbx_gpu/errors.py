"""Errors that users may catch; every message says what was expected, what was found and what to do."""

from __future__ import annotations


class HbxError(Exception):
    """Base class of the errors raised by hbx_gpu itself."""


class CorruptDataError(HbxError, ValueError):
    """Bytes on disk contradict their format, their checksum or each other."""


class CorruptChunkError(CorruptDataError):
    """One chunk cannot be decoded.

    Parameters
    ----------
    reason
        What is wrong with the bytes.
    file, array, chunk
        Where: path of the object, path of the array inside its store, number of the chunk in C order.
    """

    def __init__(self, reason: str, *, file: str = "", array: str = "", chunk: int | None = None) -> None:
        self.reason, self.file, self.array, self.chunk = reason, file, array, chunk
        where = ", ".join(
            part
            for part in (
                f"array {array!r}" if array else "",
                f"chunk {chunk}" if chunk is not None else "",
                f"file {file}" if file else "",
            )
            if part
        )
        super().__init__(f"corrupt chunk ({where}): {reason}" if where else reason)

    def __reduce__(self) -> tuple[object, ...]:
        # Exception pickles by positional args; keep the keywords when one crosses from a worker.
        return (_rebuild_chunk_error, (self.reason, self.file, self.array, self.chunk))


def _rebuild_chunk_error(reason: str, file: str, array: str, chunk: int | None) -> CorruptChunkError:
    return CorruptChunkError(reason, file=file, array=array, chunk=chunk)


class UnsafePathError(CorruptDataError):
    """A path inside an atlas or an archive leads out of it, or to a FIFO or a device instead of a file."""


class UnsupportedCodecError(HbxError, ValueError):
    """An array uses a codec that no installed package decodes."""


class UnsupportedError(HbxError, NotImplementedError):
    """A valid request that this release does not support; the message says what it supports."""


class DeviceUnavailableError(HbxError, RuntimeError):
    """This machine or installation cannot use the requested device; the message says what is missing."""


class ResourceError(HbxError, RuntimeError):
    """The system has too little memory, shared memory or room for what was asked."""


class AtlasError(HbxError):
    """The catalog of an atlas contradicts itself or the request."""


class TableError(AtlasError, ValueError):
    """A table of an atlas cannot be read or changed; names the atlas, the table and what to do."""


class RemotePathError(AtlasError, ValueError):
    """An address of an object store, where only local paths are supported."""


class RemoteError(HbxError, OSError):
    """Object storage does not answer, or refuses; names the address, never credentials.

    Attributes
    ----------
    transient
        Whether another attempt may help.
    """

    transient: bool = True


class ReplacedError(RemoteError):
    """An object in storage is not the one that was opened: its version or its size differ."""

    transient = False


class UnknownNameError(AtlasError, ValueError, KeyError):
    """A layer, feature space, column, table or feature does not exist; the message lists those that do."""

    # KeyError would show the message in quotes.
    __str__ = Exception.__str__


class AtlasLockedError(AtlasError):
    """Another process is writing to this atlas."""


class AlreadyIngestedError(AtlasError, ValueError):
    """The same file was ingested before with other options."""


class InvalidDataError(HbxError, ValueError):
    """Input data breaks a rule of the layer it is meant for (fractions in counts, duplicate ids, ...)."""
