"""Where elements live: boxes, meshes, placements, flat ranges and layout files. Pure."""
