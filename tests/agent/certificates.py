"""Certificates for tests: an authority, and members signed by it that are valid, expired or of another name.

In: a folder. Out: PEM files there. Uses the `cryptography` package, which the S3 test server brings along.
"""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ckpt.agent.transport import Tls

DAY = datetime.timedelta(days=1)


class Authority:
    """One certificate authority."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        own = _name(name)
        basic = x509.BasicConstraints(ca=True, path_length=0)
        made = _builder(own, own, self._key, days=2).add_extension(basic, critical=True)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def member(self, name: str, *, days: int = 1, trust: Authority | None = None) -> Tls:
        """Files of a member called `name`; `days` below 0: expired; `trust`: the authority that it trusts itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = _builder(_name(name), _name(self._name), key, days=days).add_extension(names, critical=False)
        stem = f"{self._name}-{name}-{days}"
        cert, private = self._folder / f"{stem}.pem", self._folder / f"{stem}.key"
        cert.write_bytes(made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return Tls(ca=(trust or self).path, cert=cert, key=private)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - 10 * DAY).not_valid_after(now + days * DAY)
