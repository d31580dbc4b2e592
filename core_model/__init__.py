"""The shared mixture-of-experts core: ragged packing, blocks, adapters, heads, checkpoints."""
