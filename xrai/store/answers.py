"""What an S3 server's answers mean: which do not come from S3 at all, which failures are transient,
and how to explain the others. Called by `S3Store`.
"""

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from xrai import errors
from xrai.errors import AlreadyExistsError, NotFoundError, WrongEndpointError, XraiError

_NUM_UNREADABLE = 2  # answers that make no sense before the server is taken for something else

# What S3 says in each answer, and a web page with status 200 does not
_ESSENTIALS = {
    "head_object": ("ETag", "ContentLength"),
    "get_object": ("ETag",),
    "put_object": ("ETag",),
    "upload_part": ("ETag",),
    "create_multipart_upload": ("UploadId",),
    "complete_multipart_upload": ("ETag",),
    "list_objects_v2": ("IsTruncated",),
}

_DAMAGED = {"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}  # on the way
_BUSY = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"}
_TRANSIENT = _DAMAGED | _BUSY | {"ConditionalRequestConflict", "OperationAborted", "408", "429"}
_WRONG_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_WRONG_REGION |= {"MethodNotAllowed", "PermanentRedirect", "TemporaryRedirect"}
_EXPIRED = "these credentials have expired; get new ones"
_REFUSED = {
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID, and "
    "that AWS_ENDPOINT_URL_S3 is the server that it is for",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY is not the one of AWS_ACCESS_KEY_ID",
    "InvalidToken": "AWS_SESSION_TOKEN is wrong, or does not belong to AWS_ACCESS_KEY_ID",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestExpired": "this machine's clock is wrong, or the credentials have expired",
    "RequestTimeTooSkewed": "this machine's clock differs from the server's; correct it",
}
_RIGHTS = {
    "read": "s3:GetObject, or the object is missing and they lack s3:ListBucket",
    "written": "s3:PutObject",
    "listed": "s3:ListBucket",
    "deleted": "s3:DeleteObject",
}


class NotS3Error(Exception):
    """The answer is none that S3 gives."""


class UnknownRequestError(errors.StoreError):
    """The server does not know a request that not all servers know."""


def network_errors() -> tuple[type[Exception], ...]:
    """All that a request may raise."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    ours = (NotS3Error, BotoCoreError, ClientError, ResponseParserError, HTTPError)
    return (*ours, ConnectionError, TimeoutError)


def ask(client: Any, operation: str, **request: Any) -> Any:
    """The answer to one request. Raises `NotS3Error` if it is none of S3's, or as boto3 does."""
    from botocore.exceptions import ClientError

    try:
        answer = getattr(client, operation)(**request)
    except ValueError as error:  # botocore reads numbers and dates in answers, without a check
        raise NotS3Error(str(error)) from error
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code"))
        if operation == "head_object" and code.isdigit() and int(code) < 500 and code != "404":
            client.get_object(**request)["Body"].close()  # a HEAD carries no reason
        raise
    for name in _ESSENTIALS.get(operation, ()):
        if name not in answer:
            if "Body" in answer:
                answer["Body"].close()
            raise NotS3Error(f"its answer has no {name}")
    if operation == "list_objects_v2":
        _check_page(answer, token=request.get("ContinuationToken"))
    return answer


def watch(client: Any) -> None:
    """Have `ask` raise errors for answers that botocore misreads."""
    # botocore calls handlers for *.* before its own for s3.*
    client.meta.events.register("before-parse.*.*", _check_raw)


def _check_raw(operation_model: Any, response_dict: Any, **_: Any) -> None:
    """Raise `ResponseParserError` for a page with status 200 that is not XML, and `NotS3Error` for
    a redirect that names no region.

    botocore takes the former for a transient fault of the server. Where each answer redirects, it
    asks for the bucket's region without end.
    """
    from botocore.parsers import ResponseParserError

    status, headers = response_dict["status_code"], response_dict["headers"]
    if status == 200 and not operation_model.has_streaming_output:
        try:
            ElementTree.fromstring(response_dict["body"] or "<empty/>")
        except ElementTree.ParseError as error:
            raise ResponseParserError(f"its answer is no XML: {error}") from error
    is_redirect = 300 <= status < 400 and operation_model.name == "HeadBucket"
    if is_redirect and "x-amz-bucket-region" not in headers:
        raise NotS3Error(f"it redirects to {headers.get('Location')}")


def _check_page(page: Any, *, token: str | None) -> None:
    if any("Key" not in entry or "Size" not in entry for entry in page.get("Contents", [])):
        raise NotS3Error("its listing has an object without Key or Size")
    if page["IsTruncated"] and page.get("NextContinuationToken") in (None, token):
        raise NotS3Error("its listing does not say how it continues, as ListObjectsV2 does")


def masked(text: str) -> str:
    """`text` without user names and passwords in URLs."""
    return re.sub(r"""(?<!\S)(["']?(?:\w+://)?)\S*@""", r"\1***@", text)


def plain(error: Exception) -> str:
    """The error's text on one line, without passwords."""
    return masked(" ".join(str(error).split())) or "no cause was given"


def explain(
    error: Exception, *, done: str, where: str, bucket: str, tries: int = 0
) -> XraiError | None:
    """Our error for one that trying again cannot fix; None for a transient one, of which there
    were `tries` before. `done` is read, written, listed or deleted.
    """
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    what, text = f"{where} cannot be {done}", plain(error)
    if isinstance(error, exceptions.ClientError):
        return _explain_answer(error, done=done, where=where, bucket=bucket)
    no_keys = (
        *(exceptions.NoCredentialsError, exceptions.PartialCredentialsError),
        *(exceptions.CredentialRetrievalError, exceptions.TokenRetrievalError, exceptions.SSOError),
    )
    if isinstance(error, no_keys):
        return errors.NoCredentialsError(
            f"{what}: {text}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give "
            "credentials in any other standard AWS way"
        )
    if isinstance(error, NotS3Error):
        return _no_s3(what, text)
    if isinstance(error, ResponseParserError):  # it may have been damaged on the way
        return _no_s3(what, text) if tries >= _NUM_UNREADABLE else None
    if isinstance(error, exceptions.SSLError):
        hint = "AWS_CA_BUNDLE names the certificates to trust"
        if "CERTIFICATE" not in text:
            hint = "if the server does not speak TLS there, AWS_ENDPOINT_URL_S3 begins with http://"
        return WrongEndpointError(f"{what}: {text}; {hint}")
    if isinstance(error, exceptions.ParamValidationError | exceptions.InvalidRegionError):
        return errors.StoreAccessError(f"{what}: {text}")
    return None


def _no_s3(what: str, why: str) -> WrongEndpointError:
    return WrongEndpointError(
        f"{what}: the endpoint does not speak S3 ({why}), or a web page such as a login answers "
        "instead; see AWS_ENDPOINT_URL_S3"
    )


def _explain_answer(error: Any, *, done: str, where: str, bucket: str) -> XraiError | None:
    """The same for an answer with an error status."""
    answer: Mapping[str, Any] = error.response.get("Error", {})
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(answer.get("Code", status))
    what = f"{where} cannot be {done}"
    said = f"{code}: {answer.get('Message', 'no further explanation')}"
    if code == "NotImplemented":
        return UnknownRequestError(f"{what}: {said}")
    if code != "501" and (status >= 500 or code in _TRANSIENT):
        return None
    if code == "NoSuchBucket":
        return errors.NoSuchBucketError(
            f"{what}: there is no bucket {bucket!r}; create it, or correct the address"
        )
    if code in _WRONG_REGION:
        hint = "see AWS_DEFAULT_REGION and AWS_ENDPOINT_URL_S3"
        if region := answer.get("Region"):
            hint = f"the bucket is in {region}, set AWS_DEFAULT_REGION"
        return WrongEndpointError(f"{what}: wrong region or endpoint ({said}); {hint}")
    if code == "PreconditionFailed" and done == "read":
        return errors.CorruptError(f"{what}: it was replaced while it was read; start again")
    if code == "PreconditionFailed":
        return AlreadyExistsError(f"{where} exists already")
    if code == "InvalidObjectState":
        return errors.StoreAccessError(
            f"{what}: it is archived ({said}); restore it, or copy it to another storage class"
        )
    if code in _REFUSED:
        return errors.ForbiddenError(f"{what}: {_REFUSED[code]} ({said})")
    if code == "AccessDenied":
        return errors.ForbiddenError(f"{what}: forbidden ({said}); these keys lack {_RIGHTS[done]}")
    if status in (401, 403):
        hint = "; S3 gives a reason, so a proxy or firewall may have answered"
        return errors.ForbiddenError(f"{what}: forbidden ({said}){hint if code.isdigit() else ''}")
    if code == "NoSuchUpload":
        return NotFoundError(f"{what}: {said}")
    if code.isdigit() and not (code == "404" and error.operation_name == "HeadObject"):
        return _no_s3(what, said)
    if status == 404:
        return NotFoundError(f"there is no {where}")
    return errors.StoreError(f"{what}: {said}")
