"""Merging small classifiers of handwritten digits: searched, and learned by gradient."""
