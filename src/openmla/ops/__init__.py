"""What users call: the native operations, the flash_mla interface, and the hot path under both."""
