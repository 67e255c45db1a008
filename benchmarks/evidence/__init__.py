"""Methods compared with equal trials on tasks that no default was chosen on: read ``protocol``."""
