"""Who carries bytes between ranks."""
