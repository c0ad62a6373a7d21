"""Files of any kind: published whole, owned by one process, on disk or in an object store, and what a disk refuses."""
