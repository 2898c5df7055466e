"""Each test here has two variants: one on a CUDA device (the mark `gpu`), one on the CPU (the mark
`ci`), which shows that the test itself is right.

The CUDA variants run with `XRAI_TEST_GPU=1 scripts/test -m gpu`, or `python -m benchmarks.gpu`.
"""

from collections.abc import Iterator

import pytest
import torch

from xrai.learning.distributed import Ranks

# Warnings of CUDA's libraries, which no one has seen yet, are shown and fail no test
_ON_GPU = (pytest.mark.gpu, pytest.mark.filterwarnings("default"))
DEVICES = [pytest.param("cpu", marks=pytest.mark.ci), pytest.param("cuda", marks=_ON_GPU)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device to test, on which nothing of an earlier test is left."""
    device = torch.device(request.param)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield device
    torch.set_num_threads(threads)


@pytest.fixture
def ranks(device: torch.device) -> Ranks:
    """The only rank of a job, on the device."""
    return Ranks(0, 1, 0, 1, device)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Sums have the same order each time; an operation that cannot do this raises.

    `tests/conftest.py` sets CUBLAS_WORKSPACE_CONFIG, which cuBLAS needs for it.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 convolutions are not TF32 on a GPU; matrix products are not by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
