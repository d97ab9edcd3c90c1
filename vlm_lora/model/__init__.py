"""The model wing: the Qwen2-VL backbone, tokens, packing, frozen features, adapters."""
