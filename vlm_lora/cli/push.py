"""Upload a trained adapter with its card, or a merged checkpoint, to the model hub: private, unless you say otherwise.

What goes up is listed first; paths of this machine are left out of it. The token is that of `hf auth login`, or
HF_TOKEN.

  vlm-lora push runs/photos me/photos --dry-run     only the list
  vlm-lora push runs/photos me/photos
  vlm-lora caption ./more --adapter hf:me/photos    use it on another machine
"""

import argparse

from vlm_lora.console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN", help="run folder, adapter folder or merged checkpoint")
    parser.add_argument("repository", metavar="OWNER/NAME", help="where to; made if it is not there")
    parser.add_argument("--public", action="store_true", help="a new repository is one that anybody can read")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")


def run(options: argparse.Namespace) -> int:
    upload(options.source, options.repository, public=options.public, dry_run=options.dry_run)
    return 0


def upload(source: str, repository: str, *, public: bool = False, dry_run: bool = False) -> None:
    """List the files, upload them and print the address."""
    from vlm_lora.inference.hub import base_left_behind, listing, push, uploads

    files = uploads(source, repository)
    say(f"To {repository}, {'which anybody can read' if public else 'private'}:")
    for line in listing(files):
        say(line)
    if base := base_left_behind(files):
        say(
            f"Its base {base!r} is a folder of this machine, and is not uploaded: users of the adapter need a copy "
            "of it, given with --model."
        )
    if not dry_run:
        print(push(files, repository, public=public))
