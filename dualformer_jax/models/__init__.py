"""What is computed: Flax modules that know nothing of data or training."""
