"""Whose certificates probes believe, where they are asked to verify them.

The authorities are the system's, or those of one file of the agent's configuration. No Secret
is read: the agent has no right to.
"""

import logging
import os
import pathlib
import ssl
import typing

_log = logging.getLogger(__name__)

_FOR_NOTHING: typing.Final = "probes with tls=verify count for nothing"
_STAYS: typing.Final = "what it said before stays in force"
NOBODY: typing.Final = "no authorities to verify certificates by: see --probe-ca-file"


class NobodyTrustedError(Exception):
    """There is no authority to verify a certificate by; says so in a few words."""


class Trust:
    """TLS as probes speak it; one context for each way to ask, made when it is first needed.

    The file is read again when it is another one. One that can not be used is a problem, and
    the one before stays in force; where there was none, nobody is trusted. Raises OSError where
    the path can not be a file's.
    """

    def __init__(self, ca_file: pathlib.Path | None = None) -> None:
        self._ca_file = ca_file
        self._contexts: dict[tuple[bool, str], ssl.SSLContext] = {}
        self._told = False
        self._authorities = ""
        self._problem = ""
        self._version = self._version_of_file()
        if ca_file is None:
            return
        try:
            self._authorities = _read(ca_file)
        except (IsADirectoryError, NotADirectoryError):
            raise
        except OSError as error:
            self._problem = f"{ca_file}: {describe(error)}: {_FOR_NOTHING}"

    @property
    def problem(self) -> str:
        """What is wrong with the file as it is now; empty where nothing is."""
        if self._ca_file is not None:
            self._look(self._ca_file)
        return self._problem

    def context(self, *, verify: bool, protocol: str) -> ssl.SSLContext:
        """The context to ask with, for one protocol above TLS. Raises NobodyTrustedError."""
        if verify and self._ca_file is not None:
            self._look(self._ca_file)
        known = self._contexts.get((verify, protocol))
        if known is None:
            known = self._contexts[verify, protocol] = self._context(verify=verify)
            known.set_alpn_protocols([protocol])
        return known

    def _look(self, ca_file: pathlib.Path) -> None:
        """Have the file read again where it has changed."""
        version = self._version_of_file()
        if version == self._version:
            return
        self._version = version
        try:
            self._authorities = _read(ca_file)
        except OSError as error:
            follows = _STAYS if self._authorities else _FOR_NOTHING
            self._problem = f"{ca_file}: {describe(error)}: {follows}"
            _log.warning("%s", self._problem)
        else:
            if self._problem:
                _log.info("%s is in force", ca_file)
            self._problem = ""
            self._contexts = {key: kept for key, kept in self._contexts.items() if not key[0]}

    def _version_of_file(self) -> tuple[int, int, int] | None:
        """What tells one file from the next; None where there is none."""
        try:
            found = self._ca_file.stat() if self._ca_file is not None else None
        except OSError:
            return None
        return found and (found.st_ino, found.st_size, found.st_mtime_ns)

    def _context(self, *, verify: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not verify:
            # Certificates are for those who send secrets; such a probe asks whether somebody answers.
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self._authorities:
            context.load_verify_locations(cadata=self._authorities)
        elif self._ca_file is not None:
            # Who names a file does not mean the system's authorities.
            raise NobodyTrustedError(NOBODY)
        else:
            context.load_default_certs()
            if not context.cert_store_stats()["x509_ca"] and not _folder_has_any():
                if not self._told:
                    _log.warning("%s: %s", _FOR_NOTHING, NOBODY)
                self._told = True
                raise NobodyTrustedError(NOBODY)
        return context


def describe(error: OSError) -> str:
    """Why a file can not be used, in a few words."""
    return "no certificates in it" if isinstance(error, ssl.SSLError) else error.strerror or str(error)


def _read(ca_file: pathlib.Path) -> str:
    """Read a file's certificates. Raises OSError where there are none."""
    # Other than ASCII stands in comments only.
    text = ca_file.read_text("ascii", "replace")
    if "\0" in text or not text:
        raise ssl.SSLError
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    return text


def _folder_has_any() -> bool:
    """Whether the system has authorities in a folder, where OpenSSL looks for them one by one."""
    folder = ssl.get_default_verify_paths().capath
    try:
        return bool(folder and os.listdir(folder))
    except OSError:
        return False
