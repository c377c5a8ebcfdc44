"""The S3 servers of the session."""

from tests.fixtures_s3 import moto_s3  # noqa: F401
