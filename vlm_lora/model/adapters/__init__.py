"""Parameter-efficient methods: attach to a backbone, save, load, switch off."""
