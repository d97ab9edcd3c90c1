"""Show what is kept on disk of images and data, or delete it.

vlm-lora cache
vlm-lora cache --limit 10     delete what was used longest ago, until 10 GB are left
vlm-lora cache --clear
"""

import argparse
import shutil
import time

from vlm_lora.config import DEFAULT_CACHE_GB, cache_folder
from vlm_lora.console import size
from vlm_lora.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="delete them; they are computed again when needed")
    parser.add_argument("--limit", type=float, metavar="GB", help="delete what was used longest ago, down to this size")


def run(options: argparse.Namespace) -> int:
    from vlm_lora.data.archives import archives_folder
    from vlm_lora.data.index import index_folder
    from vlm_lora.model.features import store_in

    if options.limit is not None and options.limit < 0:
        raise ConfigError(f"--limit {options.limit}: expected a size in GB, 0 or more")
    store = store_in(cache_folder())
    if options.limit is not None:
        store.shrink(int(options.limit * 1e9))
    use = store.use()
    print(f"{store.folder}: {use.entries:,} images, {size(use.num_bytes)}", end="")
    since = f", last used since {time.strftime('%Y-%m-%d %H:%M', time.localtime(use.oldest))}" if use.oldest else ""
    print(f"{since}. A run lets it grow to {DEFAULT_CACHE_GB:,.0f} GB, or to its --cache-gb.")
    if archives_folder().is_dir():
        sizes = [path.stat().st_size for path in archives_folder().rglob("*") if path.is_file()]
        print(f"{archives_folder()}: what was unpacked of .zip files, {size(sum(sizes))}")
    if index_folder().is_dir():
        sizes = [path.stat().st_size for path in index_folder().iterdir()]
        print(f"{index_folder()}: what was found out of data, {size(sum(sizes))}")
    if options.clear:
        store.clear()
        shutil.rmtree(archives_folder(), ignore_errors=True)
        shutil.rmtree(index_folder(), ignore_errors=True)
        print("Cleared.")
    return 0
