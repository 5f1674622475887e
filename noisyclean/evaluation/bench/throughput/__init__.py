"""``bench throughput``: how fast pairs are scored and learned, as shares of what the machine allows."""
