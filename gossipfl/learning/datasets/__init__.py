"""Data sets: arrays of training and test samples, converted once to `.npy` files that every peer maps read-only.

    folder = prepare_dataset("idx", Path("mnist"), test_fraction=0.2, seed=0, args={}, cache=Path("cache"))
    dataset = open_dataset(folder)                                  # maps the files: peers of a machine share the pages
    batch = normalise(dataset.x_train[indices], dataset)            # f32[b, C, H, W]

A new kind is a function `f(path, test_fraction, seed, **args) -> Dataset` registered in `DATASETS`, or any
`package.module:function` of the user. Reading order: `dataset` (vocabulary, checks), the kinds (`images`, `arrays`,
`text`), `store` (files). Opening a prepared data set imports numpy only.
"""

from gossipfl.learning.datasets import arrays, images, text  # noqa: F401 (registers the kinds)
from gossipfl.learning.datasets.dataset import DATASETS, Dataset, check_dataset, load_dataset, normalise
from gossipfl.learning.datasets.store import open_dataset, prepare_dataset, save_dataset

__all__ = [
    "DATASETS",
    "Dataset",
    "check_dataset",
    "load_dataset",
    "normalise",
    "open_dataset",
    "prepare_dataset",
    "save_dataset",
]
