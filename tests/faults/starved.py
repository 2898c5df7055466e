"""`xrai.train` that may write no file of more than 64 KiB."""

import atexit
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from xrai import train
from xrai.command import run_command
from xrai.learning.distributed import own_place

UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, resource.RLIM_INFINITY))
# What a measurement of coverage writes at the end is not the job's
atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, UNLIMITED)
place = own_place()
run_command(train.main, rank=place.rank, world_size=place.world_size)
