"""Show the image features kept on disk, or clear them.

vlm-lora cache
vlm-lora cache --clear
"""

import argparse
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="delete them; they are computed again when needed")


def run(options: argparse.Namespace) -> int:
    from vlm_lora.model.features import cache_folder, cache_use, clear_cache

    folder = cache_folder()
    use = cache_use(folder)
    print(f"{folder / 'features'}: {use.entries:,} images, {use.num_bytes / 2**20:,.1f} MiB", end="")
    since = f", since {time.strftime('%Y-%m-%d %H:%M', time.localtime(use.oldest))}" if use.oldest else ""
    print(since)
    if options.clear:
        clear_cache(folder)
        print("Cleared.")
    return 0
