"""Files that were made to harm a reader, each with what it must be told."""
