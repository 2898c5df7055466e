"""Wait until the data set at XRAI_DATASET is complete: until it has dataset.json, written last.

An init container or a start script runs it as `xrai wait`. A store that does not answer is waited
for as well. Wrong keys or a missing bucket end it at once, with status 2, and so does a mistake in
a config file given by `--config`: the config of a training is checked before the wait, not after.
"""

import os
import time

from xrai.command import parse, run_command
from xrai.errors import ConfigError, UnreachableError, XraiError
from xrai.log import get_logger, setup_logging
from xrai.store import open_store, seconds_of

ASK_EVERY_S = 5.0


def main() -> None:
    """Wait for at most XRAI_WAIT_S seconds, then raise `XraiError`."""
    setup_logging()
    parse("train", description="Wait for a data set, after a check of the config of a training.")
    logger = get_logger("xrai.wait")
    if not (address := os.environ.get("XRAI_DATASET", "")):
        raise ConfigError(
            "XRAI_DATASET is not set: it names the data set to wait for, a folder or s3://bucket/prefix"
        )
    wait_s = seconds_of("XRAI_WAIT_S", 86400)
    store = open_store(address)
    began, told = time.monotonic(), ""
    while True:
        try:
            # a listing, because an answer to HEAD does not say why keys are refused
            if any(entry.key == "dataset.json" for entry in store.list("dataset.json")):
                return
            found = "it has no dataset.json yet; xrai preprocess writes it last"
        except UnreachableError as error:
            found = str(error)
        if time.monotonic() - began > wait_s:
            raise XraiError(
                f"waited {wait_s:.0f} s (XRAI_WAIT_S) for the data set at {store.uri}: {found}"
            )
        if found != told:
            logger.info("waiting for the data set at %s: %s", store.uri, found)
            told = found
        time.sleep(ASK_EVERY_S)


if __name__ == "__main__":
    run_command(main)
