"""What is stored: images, index, manifest, objects, checksums. Pure. The spec is docs/reference/format.md."""
