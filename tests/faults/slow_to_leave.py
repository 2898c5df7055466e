"""`xrai.train` whose rank 0 takes seconds to leave, as where its last uploads are slow."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from xrai import train
from xrai.command import run_command
from xrai.learning.distributed import own_place
from xrai.results.folder import RunFolder

close = RunFolder.close


def close_late(self: RunFolder) -> None:
    time.sleep(5)
    close(self)


RunFolder.close = close_late  # type: ignore[method-assign]
place = own_place()
run_command(train.main, rank=place.rank, world_size=place.world_size)
