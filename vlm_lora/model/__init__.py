"""The model wing: the Qwen-VL backbone, tokens, packing, frozen features, adapters."""

import logging

# PEFT imports bitsandbytes, if it is installed, for plain LoRA too. On CPUs with AVX512-BF16 that asks the reader to
# install a kernel which is never used here (`_keep_as_quantised`). Its other messages pass.
# On a GPU `kernels.require_sound` says it better, and on a CPU there are none.
logging.getLogger("transformers.integrations.hub_kernels").addFilter(
    lambda line: "is falling back to its reference PyTorch implementation" not in line.getMessage()
)
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda line: "gemm_4bit_forward" not in line.getMessage())
