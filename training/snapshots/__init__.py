"""Network snapshots: ours in safetensors, published ones in pickles, and what a network may be built of."""
