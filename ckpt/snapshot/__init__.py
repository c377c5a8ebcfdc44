"""Device to image at one step: the pack program, lazy staging, and the fence that makes it exact."""
