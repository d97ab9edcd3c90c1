"""For ms-swift's --external_plugins: the checkpoint's own placeholder ids, a count of the image tokens, and the memory
that training takes, which goes to the file named by ``MEMORY``.
"""

import json
import os
import sys
from pathlib import Path

from swift.template.templates.qwen import Qwen2VLTemplate
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from meter import read_weights, resident, start_peak

encode, train = Qwen2VLTemplate._encode, Trainer._inner_training_loop


def checked(self, inputs):
    ids = self.processor.tokenizer.convert_tokens_to_ids
    self.image_token_id, self.video_token_id = ids("<|image_pad|>"), ids("<|video_pad|>")
    encoded = encode(self, inputs)
    found, wanted = encoded["input_ids"].count(self.image_token_id), int(os.environ["IMAGE_TOKENS"])
    if found != wanted:
        print(f"{found} image tokens in a row, {wanted} expected", flush=True)
        os._exit(1)  # an exception would make it take another row instead
    return encoded


def measured(self, *args, **kwargs):
    read_weights(self.model)
    base = start_peak()
    result = train(self, *args, **kwargs)
    memory = {"base_bytes": base, "peak_bytes": resident("VmHWM")}
    Path(os.environ["MEMORY"]).write_text(json.dumps(memory), encoding="utf-8")
    return result


Qwen2VLTemplate._encode = checked
Trainer._inner_training_loop = measured
