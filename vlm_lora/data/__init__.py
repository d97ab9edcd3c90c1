"""From what people have on disk to `Example`s and checked RGB images: no tokens, no tensors."""
