"""The real data of a run: its dataset, the accessible images and the test set; no other image is opened."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ddkit.components import registry
from ddkit.components.base import DataInfo, Dataset
from ddkit.components.observers import Observers
from ddkit.data.held_out import check_held_out, fewest, held_out_count
from ddkit.data.images import Kinds, blocks, rows_of, spread
from ddkit.data.loading import Shape, load_images, surveyed
from ddkit.distributed import ALONE, Ranks, class_rows
from ddkit.errors import InputError, is_its_own, told
from ddkit.files import bytes_of
from ddkit.recipes.tables import DataTable, Recipe
from ddkit.seeding import generator
from ddkit.text import doubles, is_text, shown

log = logging.getLogger("ddkit")
HASHED_ROWS = 100  # images that are hashed at once


def open_dataset(table: DataTable) -> Dataset:
    """Returns the recipe's dataset; raises InputError where its files cannot be used."""
    dataset: Dataset = registry.create("dataset", table.use, table.options, where="data", directory=table.dir)
    dataset.memory_mib = table.memory
    try:
        names, counts = list(dataset.class_names), class_counts(dataset.labels("train"), len(dataset.class_names))
    except BaseException as error:
        if not is_its_own(error):
            raise
        helps = dataset.advice
        raise InputError(f"The dataset '{table.use}' could not be opened: {told(error)}.{helps}") from error
    for twice in doubles(names):
        raise InputError(f"The dataset '{table.use}' has two classes with the name '{twice}'. Rename one of them.")
    for name in names:
        if not is_text(name):
            raise InputError(f"The dataset '{table.use}' has a class whose name is not UTF-8 text ({shown(name)}). Rename the class.")
    if len(counts) > len(names):
        raise InputError(f"The dataset '{table.use}' has the label {len(counts) - 1}, but only {len(names)} class names.")
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            raise InputError(f"The class '{name}' of the dataset '{table.use}' has no training image. Add images or remove the class.")
    return dataset


def data_info(dataset: Dataset, shape: Sequence[int]) -> DataInfo:
    """Returns what is known of `dataset` with images of `shape` (C, H, W)."""
    channels, height, width = shape
    return DataInfo(class_names=tuple(dataset.class_names), channels=channels, size=(height, width), mirror=dataset.mirror)


def check_classes(dataset: Dataset) -> None:
    """Raises InputError where there are fewer classes than a classifier can tell apart."""
    if len(dataset.class_names) < 2:
        raise InputError(f"The data has only the classes {list(dataset.class_names)}, but a classifier needs at least two.")


def class_counts(labels: Tensor, classes: int) -> list[int]:
    """Returns the number of rows of each class 0..classes-1."""
    return torch.bincount(labels, minlength=classes).tolist()


def class_indices(labels: Tensor, classes: int, seed: int, part: slice) -> list[int]:
    """Returns `part` of each class's rows in an order of (seed, class) alone, class by class, each class's in ascending order.

    Accessible are the first `pipc` of that order. Held out are the last ones, so they do not depend on pipc.
    """
    chosen = []
    order = labels.argsort(stable=True)  # stable: each class's rows ascend
    for label, rows in enumerate(order.split(class_counts(labels, classes))):
        shuffled = torch.randperm(len(rows), generator=generator(seed, "accessible", label))
        chosen.append(rows[shuffled[part].sort().values])
    return torch.cat([order[:0], *chosen]).tolist()


def repeated(images: Tensor, labels: Tensor, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns images (n, C, H, W) and ascending labels of which each class that is there has at least as many as `wanted` of it.

    The images of a class that has fewer are taken again, every second time mirrored.
    """
    rows, mirrored = [], []
    for own, least in zip(torch.arange(len(labels)).split(class_counts(labels, len(wanted))), wanted, strict=True):
        again = own.repeat(-(-least // max(1, len(own))))[: max(least, len(own))] if len(own) < least else own
        rows.append(again)
        mirrored.append(torch.arange(len(again)) // max(1, len(own)) % 2 == 1)
    chosen, flipped = torch.cat(rows), torch.cat(mirrored)
    if len(chosen) == len(labels):
        return images, labels
    found = rows_of(images, chosen)
    found[flipped] = found[flipped].flip(3)
    return found, labels[chosen]


def colour(dataset: Dataset, shape: Shape) -> Shape:
    """Returns the shape of a run's images, `shape` being that of the accessible ones: with 3 channels if others are in colour."""
    return (3, *shape[1:]) if shape[0] == 1 and not dataset.grey() else shape


class NoImages(Dataset):
    """The classes that a teacher knows, and not one image: for runs that need no real data."""

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__()
        self._names = list(class_names)

    @property
    def class_names(self) -> Sequence[str]:
        return self._names

    def labels(self, split: str) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def images(self, split: str, indices: Sequence[int]) -> Sequence[Tensor]:
        return []


class SomeClasses(Dataset):
    """The images of some classes of another dataset, whose labels count these alone, in the order of `names`."""

    def __init__(self, whole: Dataset, names: Sequence[str]) -> None:
        super().__init__(name=whole.name)
        self.whole = whole
        self.mirror = whole.mirror
        self.memory_mib = whole.memory_mib
        self._names = list(names)
        self._new = torch.full((len(whole.class_names),), -1)
        for label, name in enumerate(names):
            self._new[list(whole.class_names).index(name)] = label

    @property
    def class_names(self) -> Sequence[str]:
        return self._names

    @property
    def resized(self) -> int:
        return self.whole.resized

    @resized.setter
    def resized(self, count: int) -> None:
        self.whole.resized = count

    def labels(self, split: str) -> Tensor:
        found = self._new[self.whole.labels(split)]
        return found[found >= 0]

    def _rows(self, split: str, indices: Sequence[int]) -> list[int]:
        """Returns which images of the other dataset `indices` are."""
        kept = (self._new[self.whole.labels(split)] >= 0).nonzero().flatten()
        return kept[torch.tensor(list(indices), dtype=torch.int64)].tolist()

    def images(self, split: str, indices: Sequence[int]) -> Sequence[Tensor] | Tensor:
        return self.whole.images(split, self._rows(split, indices))

    def shapes(self, split: str, indices: Sequence[int]) -> Sequence[Shape] | None:
        return self.whole.shapes(split, self._rows(split, indices))

    def grey(self) -> bool:
        return self.whole.grey()

    def files(self, split: str, indices: Sequence[int]) -> Sequence[str] | None:
        return self.whole.files(split, self._rows(split, indices))

    def decoding_key(self) -> str:
        return f"{type(self.whole).__qualname__} {self.whole.decoding_key()}"

    def sources(self, split: str, indices: Sequence[int]) -> list[str | int]:
        return self.whole.sources(split, self._rows(split, indices))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.whole.fingerprint()} {self._names}".encode()).hexdigest()


class RealData:
    """The accessible real images of a run: `images` (m, C, H, W) in pixel units (uint8 or float), `labels` (m,).

    In a run of several processes `images` are those of this one's classes, which are rows `own` of the labels; no other is opened
    unless all_images() is asked for.

    `split` names what evaluations test on: "test", or "held-out" where `held_out` training images of each class are.
    """

    def __init__(
        self,
        dataset: Dataset,
        pipc: int | str,
        seed: int,
        shape: Shape | None = None,
        *,
        held_out: int | None = None,
        ranks: Ranks = ALONE,
        watchers: Observers | None = None,
    ) -> None:
        """Opens only the accessible images; `shape` is needed where pipc is 0. `held_out` None: the test split is tested on."""
        self.dataset = dataset
        self.pipc = pipc
        self.seed = seed
        self.held_out = held_out
        self.ranks = ranks
        self.split = "test" if held_out is None else "held-out"
        self._watchers = watchers or Observers()
        labels, classes = dataset.labels("train"), len(dataset.class_names)
        self.indices = class_indices(labels, classes, seed, slice(None if pipc == "all" else int(pipc)))
        if not self.indices and shape is None:
            raise InputError(
                "With --pipc 0 and no test images the image shape is not known. Use a larger --pipc, or a teacher made by ddkit, whose "
                "file records the shape (--teacher FILE)."
            )
        self.labels = labels[torch.tensor(self.indices, dtype=torch.int64)]
        self.own = class_rows(self.labels, ranks.classes(classes))
        own = self.indices[self.own]
        agreed = shape
        if shape is None and ranks.world_size > 1:  # that which a single process would find
            kinds, together = surveyed(dataset, "train", own), Kinds()
            for grey, sizes in ranks.all_gather_object([kinds.grey, [[*size, count] for size, count in kinds.sizes.items()]]):
                together.grey &= grey
                together.sizes.update({(height, width): count for height, width, count in sizes})
            agreed = together.shape
        report = None
        if own:
            shared = f", {len(own):,} in this process" if len(own) < len(self.indices) else ""
            of = f"{len(self.indices):,} of {len(labels):,} training images, {classes} classes"
            report = self._watchers.begin("reading", f"Reading the data ({dataset.name}: {of}{shared})", total=len(own))
        self.images = load_images(dataset, "train", own, agreed, report)
        channels, height, width = self.images.shape[1:]
        if shape is None and (coloured := colour(dataset, (channels, height, width))) != self.images.shape[1:]:
            self.images = load_images(dataset, "train", own, coloured, report)
        self._warn_of_darkness()
        self.info = data_info(dataset, self.images.shape[1:])

    def _warn_of_darkness(self) -> None:
        """Warns if the accessible images use an eighth of their range or less, as those of files with fewer bits than they declare do."""
        most = 255 if self.images.dtype == torch.uint8 else 1.0
        bright = not len(self.images) or any(float(part.max()) > most / 8 for part in blocks(self.images, HASHED_ROWS))
        if any(self.ranks.all_gather_object(bright)):
            return
        highest = max(float(part.max()) for part in blocks(self.images, HASHED_ROWS))
        bits = getattr(self.dataset, "bits", None)
        fix = "Check how the images were saved, and scale their values."
        if bits:
            needed = int(max(highest - 0.5, 0) * (2**bits - 1) / 255).bit_length()
            fix = f"If they are 16-bit grey files with {needed} bits, use --set data.bits={max(8, needed)} to scale them."
        log.warning("The accessible images are almost black: their largest value is %g of %g. %s", highest, most, fix)

    def all_images(self) -> Tensor:
        """Returns the accessible images of all classes, which one of several processes opens now."""
        if len(self.images) == len(self.indices):
            return self.images
        return load_images(self.dataset, "train", self.indices, self.info.shape)

    def sample(self) -> Tensor:
        """Returns the accessible images that stand for all of them in a report."""
        rows = spread(torch.arange(len(self.labels)))
        own = rows[(rows >= self.own.start) & (rows < self.own.stop)] - self.own.start
        return self.ranks.all_gather(rows_of(self.images, own).cpu(), "gathering")

    def digest(self) -> str:
        """Returns a sha256 of the accessible images and labels, class by class: each process has seen its own classes alone."""
        counts = class_counts(self.labels, self.info.classes)
        own = []
        for images in self.images.split([counts[label] for label in self.ranks.classes(self.info.classes)]):
            of_class = hashlib.sha256()
            for part in blocks(images, HASHED_ROWS):
                of_class.update(bytes_of(part))
            own.append(of_class.hexdigest())
        digest = hashlib.sha256(repr(self.info.shape).encode())
        digest.update(bytes_of(self.labels))
        for part in self.ranks.all_gather_object(own):
            digest.update("".join(part).encode())
        return digest.hexdigest()

    @classmethod
    def of(cls, recipe: Recipe, dataset: Dataset, shape: Shape | None, ranks: Ranks = ALONE, watchers: Observers | None = None) -> RealData:
        """Returns the real data that `recipe` asks for."""
        held_out = (recipe.data.held_out or held_out_count(dataset, recipe.pipc)) if recipe.data.test == "held-out" else None
        return cls(dataset, recipe.pipc, recipe.seed, shape, held_out=held_out, ranks=ranks, watchers=watchers)

    @property
    def sources(self) -> list[str | int]:
        """File names or indices of the accessible images."""
        return self.dataset.sources("train", self.indices)

    def counts(self) -> dict[str, int]:
        """Returns the number of accessible images by class name."""
        return dict(zip(self.info.class_names, class_counts(self.labels, self.info.classes), strict=True))

    def check_test_set(self) -> None:
        """Raises InputError if the test split is empty, or too few training images are left to hold out."""
        if self.held_out is not None:
            check_held_out(self.dataset, self.pipc, self.held_out)
        elif len(self.dataset.labels("test")) == 0:
            least, held_out = fewest(self.dataset)[1], held_out_count(self.dataset, self.pipc)
            fits = self.pipc != "all" and int(self.pipc) + held_out <= least
            flags = f"with --set data.test=held-out{'' if fits else f' --pipc {least - held_out}'}"
            helps = f", or test on held-out training images {flags}" if least > 1 else ""
            raise InputError(f"The dataset has no test images, so nothing can be evaluated. Use --evaluate none{helps}.")

    @cached_property
    def test_set(self) -> tuple[Tensor, Tensor]:
        """(images, labels) of what evaluations test on, read once; raises InputError as check_test_set does."""
        self.check_test_set()
        split = "test" if self.held_out is None else "train"
        labels = self.dataset.labels(split)
        indices: Sequence[int] = range(len(labels))
        if self.held_out is not None:
            indices = class_indices(labels, self.info.classes, self.seed, slice(-self.held_out, None))
        report = self._watchers.begin("reading", f"Reading {len(indices):,} {self.split} images", total=len(indices))
        return load_images(self.dataset, split, indices, self.info.shape, report), labels[torch.tensor(indices, dtype=torch.int64)]
