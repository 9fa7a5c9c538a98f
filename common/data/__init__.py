"""Named data sets, augmentation of their images, and loaders that can start at any step."""

from common.data.augment import Augmentation
from common.data.copies import SmallCopy
from common.data.loaders import Batches, Loader
from common.data.sets import Data, DataError, Split, open_data

__all__ = ["Augmentation", "Batches", "Data", "DataError", "Loader", "SmallCopy", "Split", "open_data"]
