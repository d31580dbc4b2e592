"""A batch of cases that ends with each of them exactly once: claims, journal, workers, manifest."""
