"""What ckpt looks like in use; see README.md in this folder."""
