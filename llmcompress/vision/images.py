"""Images to calibrate and to judge on: the bundled digits, a folder of classes, or arrays of a file.

The digits are the 1,797 of scikit-learn's ``load_digits`` (Alpaydin & Kaynak, 1998, UCI, CC BY 4.0): 8 × 8 pixels of 17
levels. The last 500 are held out: networks of this package are neither trained nor calibrated on them."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmcompress.errors import UserError
from llmcompress.resources import PACKAGE

#: of the digits, from the end
HELD_OUT = 500
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_NAMES = {"images": ("images", "x"), "labels": ("labels", "y")}


@dataclass(frozen=True)
class Images:
    """Images and what they show.

    Attributes:
        pixels: (N, C, H, W) float32.
        labels: (N,) int64; None if they are not known.
    """

    pixels: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: Tensor | slice) -> Images:
        """Some of them."""
        return Images(self.pixels[index], None if self.labels is None else self.labels[index])

    def batches(self, size: int = 64) -> list[Tensor]:
        """The pixels, some images at a time."""
        return list(self.pixels.split(size))


@dataclass(frozen=True)
class ImageSet:
    """What a run is given: images to calibrate (and train) on, and others to judge on.

    Attributes:
        train: all that may be learnt from.
        test: held out; has no labels where the data has none.
    """

    train: Images
    test: Images

    def calibration(self, samples: int, seed: int) -> Images:
        """``samples`` of the images to learn from, drawn with a seed; all if there are fewer."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train.take(order[:samples])


def digits() -> ImageSet:
    """The bundled digits, (N, 1, 8, 8) in [0, 1]."""
    stored = load_file(PACKAGE / "data" / "digits" / "digits.safetensors")
    all_of_them = Images(stored["images"].float().div(16)[:, None], stored["labels"].long())
    return ImageSet(all_of_them.take(slice(0, -HELD_OUT)), all_of_them.take(slice(-HELD_OUT, None)))


def read_images(
    source: str, samples: int, seed: int, size: int = 0, normal: Path | None = None, grey: bool = False
) -> ImageSet:
    """The images of ``--data``.

    Args:
        source: ``digits``, a folder with a folder of images per class, or an ``.npz`` with ``images`` and ``labels``.
        samples: to calibrate on; of a folder or a file the others are held out.
        seed: of the split.
        size: pixels of a side that images of a folder are brought to; 0 leaves them, and they must be alike.
        grey: images of a folder have one channel instead of three.
        normal: a ``preprocessor_config.json`` whose means and deviations images of a folder are normalized by.

    Raises:
        UserError: no such data, or not enough.
    """
    if source == "digits":
        return digits()
    path = Path(source)
    if path.is_dir():
        found = _from_folder(path, size, normal, grey)
    elif path.suffix == ".npz" and path.is_file():
        found = _from_file(path)
    else:
        raise UserError("neither 'digits' nor a folder nor a .npz file", source, "check --data")
    if len(found) < 2:
        raise UserError(f"has {len(found)} images", source, "give one to calibrate and one to judge on at least")
    held = max(1, min(len(found) - samples, len(found) - 1)) if len(found) > samples else max(1, len(found) // 5)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return ImageSet(found.take(order[held:]), found.take(order[:held]))


def _from_file(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[name] for key, names in _NAMES.items() for name in names if name in stored}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"is not readable ({str(error)[:100]})", str(path), "save it by numpy.savez, no objects"
        ) from None
    if "images" not in arrays:
        raise UserError("has no array 'images'", str(path), "save (N, C, H, W) as images, (N,) as labels")
    pixels = arrays["images"]
    if pixels.ndim != 4 or pixels.dtype.kind not in "fiu":
        raise UserError(f"images are {pixels.dtype} {pixels.shape}", str(path), "save numbers (N, C, H, W)")
    scale = 255.0 if pixels.dtype == np.uint8 else 1.0
    x = torch.from_numpy(pixels.astype(np.float32) / np.float32(scale))
    if not torch.isfinite(x).all():
        raise UserError("images hold NaN or infinities", str(path), "save finite numbers")
    return Images(x, _labels(arrays.get("labels"), len(x), path))


def _labels(labels: np.ndarray | None, count: int, path: Path) -> Tensor | None:
    if labels is None:
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or (count and labels.min() < 0):
        raise UserError(f"labels are {labels.dtype} {labels.shape}", str(path), f"save ({count},) class numbers")
    return torch.from_numpy(labels.astype(np.int64))


def _from_folder(path: Path, size: int, normal: Path | None, grey: bool) -> Images:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UserError("reading image files needs Pillow", str(path), "pip install pillow, or give a .npz") from None
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir())
    files = [
        (f, n) for n, folder in enumerate(classes) for f in sorted(folder.iterdir()) if f.suffix.lower() in _SUFFIXES
    ]
    if not files:
        raise UserError("has no folders of images", str(path), "put the images of each class into a folder of its own")
    pixels = []
    for file, _ in files:
        try:
            with Image.open(file) as opened:
                image = opened.convert("L" if grey else "RGB")
                image = image.resize((size, size)) if size else image
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"is not readable ({type(error).__name__})", str(file), "remove it") from None
        pixels.append(torch.from_numpy(np.atleast_3d(np.asarray(image)).copy()).permute(2, 0, 1).float() / 255)
    if len({p.shape for p in pixels}) > 1:
        raise UserError("images have several sizes", str(path), "say --image-size")
    return Images(_normalized(torch.stack(pixels), normal), torch.tensor([n for _, n in files]))


def _normalized(x: Tensor, normal: Path | None) -> Tensor:
    if normal is None or not normal.is_file():
        return x
    try:
        said = json.loads(normal.read_text(encoding="utf-8"))
        mean, deviation = (torch.tensor(said[key]).view(1, -1, 1, 1) for key in ("image_mean", "image_std"))
        return (x - mean) / deviation
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"has no means and deviations ({error})", str(normal), "take the one of the model") from None
