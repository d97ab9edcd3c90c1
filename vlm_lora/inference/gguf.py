"""A merged checkpoint as the two files that llama.cpp and Ollama read: the language model, and the tower (mmproj).

The work is llama.cpp's own converter's, a program of its own that is run and not imported.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vlm_lora.errors import ConfigError, ModelError
from vlm_lora.model.preprocess import load_preprocessor

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
"""Its names on the PATH: of a checkout or a distribution's package, and of the package on the index."""


@dataclass(frozen=True, slots=True)
class Gguf:
    """The two files, and the fewest and the most tokens of an image, which llama.cpp must be told: it does not read
    the pixel limits of a model."""

    model: Path
    tower: Path
    image_tokens: tuple[int, int]

    @property
    def command(self) -> str:
        """What serves them."""
        least, most = self.image_tokens
        return (
            f"llama-server -m {self.model} --mmproj {self.tower} --jinja "
            f"--image-min-tokens {least} --image-max-tokens {most}"
        )


def find_converter() -> Path:
    """The converter on the PATH.

    Raises:
        ConfigError: there is none.
    """
    found = next(filter(None, map(shutil.which, CONVERTERS)), None)
    if found is None:
        raise ConfigError(
            f"--gguf: there is no {CONVERTERS[0]} on the PATH, llama.cpp's converter. Put a checkout of llama.cpp "
            "there, or install its package (docs/serving.md)."
        )
    return Path(found)


def to_gguf(merged: Path, converter: Path) -> Gguf:
    """Write ``NAME-F16.gguf`` and ``mmproj-NAME-F16.gguf`` into the folder of a merged checkpoint.

    Raises:
        ModelError: the converter gave up, in its own words.
    """
    name = merged.absolute().name
    files = [merged / f"{name}-F16.gguf", merged / f"mmproj-{name}-F16.gguf"]
    for file, more in zip(files, ([], ["--mmproj"]), strict=True):
        program = [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]
        command = [*program, str(merged), "--outfile", str(file), "--outtype", "f16", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not file.is_file():
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ModelError(f"{converter.name}: {why}. {merged} is whole, its GGUF is not.")
    preprocessor = load_preprocessor(str(merged))
    least, most = preprocessor.pixel_limits
    token = (preprocessor.processor.image_processor.patch_size * preprocessor.merge_size) ** 2
    return Gguf(files[0], files[1], (-(-least // token), most // token))
