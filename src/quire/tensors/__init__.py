"""Device, storage, attention, models and sampling. Knows tensors and no request."""
