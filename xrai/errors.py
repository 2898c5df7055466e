"""The one tree of errors; `xrai.command.run_command` turns them into an exit status."""


class XraiError(Exception):
    """An error that one line explains: what is wrong, the value, and what to do."""

    exit_status = 1


class UserError(XraiError):
    """The user's mistake: a wrong address, key, value or input. Nothing was changed."""

    exit_status = 2


class ConfigError(UserError):
    """An unknown key, a wrong type or a value out of range, in a config file or a flag."""


class SourceError(UserError):
    """The source of raw images is missing, empty, or not laid out as documented."""


class DatasetError(UserError):
    """An address holds no usable data set, or one that does not fit what was asked."""


class RunError(UserError):
    """An address holds no usable training run, or one that does not fit what was asked."""


class InUseError(UserError):
    """Another process writes the same run or data set."""


class ImageError(XraiError):
    """One image cannot be used. The message is the short reason that the manifest keeps."""


class OtherImageError(ImageError):
    """One image is readable, but no single frontal radiograph of a chest: its header says so."""


class CorruptError(XraiError):
    """Stored bytes are not what was written: a hash, a size or a format does not match."""


class StoreError(XraiError):
    """The object store failed. The message names the address, the key and the cause."""


class NotFoundError(StoreError):
    """There is no such object."""


class TooLargeError(StoreError):
    """The object has more bytes than were asked for at most."""


class StoreAccessError(StoreError, UserError):
    """The store's address or credentials are wrong."""

    exit_status = 2


class ForbiddenError(StoreAccessError):
    """The store refused: the keys are wrong or lack the right. The object may exist."""


class NoCredentialsError(StoreAccessError):
    """No keys were found in the standard AWS environment and files."""


class NoSuchBucketError(StoreAccessError):
    """The bucket does not exist."""


class WrongEndpointError(StoreAccessError):
    """The bucket lives in another region, or the endpoint does not speak S3."""


class UnreachableError(StoreError):
    """The store did not answer within the time-out, after all retries."""


class AlreadyExistsError(StoreError):
    """A conditional write found the object already there."""


class TrainingError(XraiError):
    """Training cannot continue: a loss that is not finite, a lost rank, a missed deadline."""


class StoppedError(XraiError):
    """The job was asked to stop (SIGTERM or SIGINT) and has saved its state."""

    exit_status = 143
