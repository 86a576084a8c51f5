"""The tree of every error that vecsvc raises on purpose; anything else that escapes is a bug of ours.

VecsvcError
    UserError                      the caller can mend it: exit code 2, HTTP 4xx
        ConfigError                a setting has a value it cannot have
        BackendMissing             a library of an extra is not installed
        UnknownKind                no such kind of index
        UnknownParameter           a parameter that the kind does not know
        InvalidParameter           a parameter out of its bounds
        CorpusError                the corpus cannot be indexed as it is
            CorpusUnreadable       no such file, or no Parquet
            MissingColumn
            BadRow                 one row is to blame; names its number and id
        RequestError
            Unauthorized           no key, or none that holds
            Forbidden              the key may do other things, but not this
            MalformedRequest       the bytes are not what they say they are
            InvalidRequest         well-formed, but wrong
                DimensionMismatch
                InvalidVector      NaN, infinite, too large, or zero under cosine
            UnknownIndex
            UnknownModel           no encoder of that name is served
            UnknownId
            BodyTooLarge
            TextTooLong            more tokens than the encoder reads, and the caller wants no cut
            UnsupportedMediaType
            RequestTimeout         the body did not arrive in time
        UnknownVersion             no such version in the index folder
        VersionExists              a version is never written twice
        VersionIncomplete          shards of a version that is built in parts are missing
        PartsDiffer                they are there, and not of one build
    ArtifactError                  what was built cannot be served
        ArtifactDamaged            a file differs from the manifest; names the file
        ArtifactUnfit              whole, but written for another format or library
        RecallMissed               whole, but not as good as was required
    EncoderError
        EncoderMismatch            the encoder is not the one the index was built with
    StorageError                   the disk or the object store refused
    ServiceError                   the service cannot answer now
        Overloaded
            RateLimited            one key asks for more than its share
        NotReady
            ShardsMissing          shards that the question needs have no node that answers
        DeadlineExceeded
        NodeFailed                 a node broke off, or sent what nobody can read
            ProtocolError          bytes that are no frame of the shard protocol
    InternalError                  a bug of ours, seen from another process
"""

from collections.abc import Sequence
from typing import Any, Final, Self

import msgspec

MAX_SHOWN: Final = 80  # characters of a value in a message
MAX_LISTED: Final = 10  # things that a message names one by one
MEND_VERSION: Final = (
    "serve another version (vecsvc rollback), and build this one again or copy it from where it is whole "
    "(vecsvc pull STORE DIR --again; where the store is damaged, vecsvc push DIR STORE --again)"
)


def listed(things: Sequence[object]) -> str:
    """Things as a message names them, with the number of those left out."""
    more = f" and {len(things) - MAX_LISTED} more" if len(things) > MAX_LISTED else ""
    return ", ".join(map(str, things[:MAX_LISTED])) + more


def shown(value: Any) -> str:
    """A value as JSON shows it, cut where it is long."""
    try:
        text = msgspec.json.encode(value).decode()
    except (msgspec.EncodeError, UnicodeEncodeError, RecursionError, OverflowError):
        text = repr(value) if isinstance(value, str) else type(value).__name__
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


class VecsvcError(Exception):
    code = "internal"

    @classmethod
    def told(cls, message: str) -> Self:
        """The error with these words and no others, which is how one that another process raised is raised here."""
        return cls.__new__(cls, message)


class UserError(VecsvcError):
    code = "invalid"


class ConfigError(UserError):
    code = "bad_setting"


class BackendMissing(UserError):
    code = "backend_missing"


class UnknownKind(UserError):
    code = "unknown_kind"


class UnknownParameter(UserError):
    code = "unknown_parameter"


class InvalidParameter(UserError):
    code = "invalid_parameter"


class CorpusError(UserError):
    code = "bad_corpus"


class CorpusUnreadable(CorpusError):
    code = "corpus_unreadable"


class MissingColumn(CorpusError):
    code = "missing_column"


class BadRow(CorpusError):
    code = "bad_row"


class RequestError(UserError):
    code = "invalid"


class Unauthorized(RequestError):
    code = "unauthorized"


class Forbidden(RequestError):
    code = "forbidden"


class MalformedRequest(RequestError):
    code = "malformed"


class InvalidRequest(RequestError):
    code = "invalid"


class DimensionMismatch(InvalidRequest):
    code = "dimension_mismatch"


class InvalidVector(InvalidRequest):
    code = "invalid_vector"


class UnknownIndex(RequestError):
    code = "unknown_index"


class UnknownModel(RequestError):
    code = "model_not_found"  # the word that OpenAI's clients know


class UnknownId(RequestError):
    code = "unknown_id"


class BodyTooLarge(RequestError):
    code = "body_too_large"


class TextTooLong(RequestError):
    code = "text_too_long"


class UnsupportedMediaType(RequestError):
    code = "unsupported_media_type"


class RequestTimeout(RequestError):
    code = "request_timeout"


class UnknownVersion(UserError):
    code = "unknown_version"


class VersionExists(UserError):
    code = "version_exists"


class VersionIncomplete(UserError):
    code = "version_incomplete"


class PartsDiffer(UserError):
    code = "parts_differ"


class ArtifactError(VecsvcError):
    code = "artifact"


class ArtifactDamaged(ArtifactError):
    """`remedy` ends the message; the usual one is for a file of a version."""

    code = "artifact_damaged"

    def __init__(self, message: str, *, remedy: str = MEND_VERSION) -> None:
        super().__init__(f"{message}; {remedy}")


class ArtifactUnfit(ArtifactError):
    code = "artifact_unfit"


class RecallMissed(ArtifactError):
    code = "recall_missed"


class EncoderError(VecsvcError):
    code = "encoder"


class EncoderMismatch(EncoderError):
    code = "encoder_mismatch"


class StorageError(VecsvcError):
    code = "storage"


class ServiceError(VecsvcError):
    """`retry_after_s` is when it may go better; None where nobody can tell."""

    code = "unavailable"
    retry_after_s: float | None = None

    def __init__(self, message: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class Overloaded(ServiceError):
    code = "overloaded"
    retry_after_s = 1.0


class RateLimited(Overloaded):
    code = "rate_limited"


class NotReady(ServiceError):
    code = "not_ready"
    retry_after_s = 1.0


class ShardsMissing(NotReady):
    code = "shards_missing"


class DeadlineExceeded(ServiceError):
    code = "deadline_exceeded"


class NodeFailed(ServiceError):
    code = "node_failed"


class ProtocolError(NodeFailed):
    code = "protocol"


class InternalError(VecsvcError):
    code = "internal"
