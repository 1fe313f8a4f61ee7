"""Data sets for probing: torch datasets of (image, label) with `classes` and `multi_label`."""

from vlattn.probing.data.base import LabeledImages as LabeledImages
from vlattn.probing.data.coco_presence import coco_presence as coco_presence
from vlattn.probing.data.coco_presence import tiny_coco_presence as tiny_coco_presence
from vlattn.probing.data.csv_manifest import csv_manifest as csv_manifest
from vlattn.probing.data.digits import digits as digits
from vlattn.probing.data.hf_datasets import from_hf_datasets as from_hf_datasets
from vlattn.probing.data.image_folder import image_folder as image_folder
from vlattn.probing.data.torch_dataset import from_torch as from_torch
