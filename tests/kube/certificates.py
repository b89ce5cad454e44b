"""A certificate authority for one test, with as little in it as TLS asks for."""

import datetime
import ipaddress
import pathlib
import ssl
import typing
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Pair(typing.NamedTuple):
    """A certificate and its key, as files."""

    certificate: pathlib.Path
    key: pathlib.Path


class Authority:
    """Signs certificates for 127.0.0.1."""

    def __init__(self, folder: pathlib.Path, name: str = "test-ca") -> None:
        self._folder = folder
        self._name = _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = _sign(self._name, self._name, self._key.public_key(), self._key, [])
        self.certificate = folder / f"{name}.crt"
        self.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def pair(
        self, name: str, address: str = "127.0.0.1", *, names: Sequence[str] = (), expired: bool = False
    ) -> Pair:
        """A certificate for an address and DNS names, in force now or an hour ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        subjects = [x509.IPAddress(ipaddress.ip_address(address)), *map(x509.DNSName, names)]
        certificate = _sign(_name(name), self._name, key.public_key(), self._key, subjects, expired=expired)
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair

    def server_context(self, pair: Pair, *, client_certificates: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.certificate))
        context.load_cert_chain(pair.certificate, pair.key)
        context.verify_mode = ssl.CERT_OPTIONAL if client_certificates else ssl.CERT_NONE
        return context


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _sign(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    key: ec.EllipticCurvePrivateKey,
    subjects: Sequence[x509.GeneralName],
    *,
    expired: bool = False,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=2 if expired else 0)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=not subjects, path_length=None), critical=True)
    )
    if subjects:
        builder = builder.add_extension(x509.SubjectAlternativeName(subjects), critical=False)
    return builder.sign(key, hashes.SHA256())
