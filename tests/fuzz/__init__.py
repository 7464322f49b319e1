"""Hostile files: whatever bytes a reader is given, it answers or raises one of its documented errors."""
