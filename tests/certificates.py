"""Certificates for the tests of TLS, signed by an authority that is made for each test."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_PLAIN = serialization.NoEncryption()


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(subject: str, issuer: str, public_key: Any, days: int) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder(_name(issuer), _name(subject), public_key, x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=2))
        .not_valid_after(now + dt.timedelta(days=days))
    )


def pem(key: Any, encryption: Any = _PLAIN) -> bytes:
    data: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return data


class Authority:
    """Signs certificates for 127.0.0.1 and localhost; `ca` is its own, as a file."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        made = (
            _builder(name, name, self._key.public_key(), 30)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca = self._write(f"{name}.pem", made.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, days: int = 30, names: tuple[str, ...] = ("localhost",)) -> tuple[str, str]:
        """The files of a certificate and of its key; written again under the same name they are renewed."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        alternatives += map(x509.DNSName, names)
        made = (
            _builder(name, self._name, key.public_key(), days)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        cert = self._write(f"{name}-cert.pem", made.public_bytes(serialization.Encoding.PEM))
        return cert, self._write(f"{name}-key.pem", pem(key))

    def encrypted_key(self, name: str) -> str:
        key = ec.generate_private_key(ec.SECP256R1())
        return self._write(name, pem(key, serialization.BestAvailableEncryption(b"secret")))

    def _write(self, name: str, data: bytes) -> str:
        path = self._folder / name
        path.write_bytes(data)
        return str(path)
