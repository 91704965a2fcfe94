"""What users call: the native operations, the flash_mla interface, and the hot path under both.

Importing any of it registers the operations with torch.library, before anything can trace them.
"""

from openmla.ops import library as library
