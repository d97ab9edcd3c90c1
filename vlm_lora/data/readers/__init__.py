"""From a folder, a file or a hub name to Examples, gathered by image.

`sources` has `read_dataset`: `detect` finds out what a path holds; `tables` (JSONL, JSON, CSV), `parquet`, `shards`
(WebDataset) and `hub` give rows, and `rows` knows what a row means; `folders` (sidecars) and `coco` (COCO captions,
VQAv2) give dialogues at once; `gather` puts together what is about the same image. None decodes an image.
"""

from vlm_lora.data.readers.detect import FORMATS
from vlm_lora.data.readers.gather import BadRow, Dataset, bad_rows
from vlm_lora.data.readers.sources import DataSettings, below, read_dataset

__all__ = ["FORMATS", "BadRow", "DataSettings", "Dataset", "bad_rows", "below", "read_dataset"]
