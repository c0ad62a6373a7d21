"""Block codecs: the bytes that the targets of a block of positions take."""
