"""Read who to ask and who to be: kubeconfig, service account or a bare URL, by kubernetes_asyncio.

What can not work becomes a `ConfigError` of one line before anything is asked.
"""

import asyncio
import base64
import binascii
import logging
import os
import pathlib
import typing
import urllib.parse

from lbproxy import errors, secrecy
from lbproxy.kube import slim

EXEC_PLUGIN_TIMEOUT_S = 60.0
IN_CLUSTER_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"
IN_CLUSTER_CA = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"

_BROKEN_KUBECONFIG = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


class RefreshError(OSError):
    """A credential that has to be renewed could not be."""


class Origin(typing.NamedTuple):
    """Where the configuration is read from: a kubeconfig, a bare URL, or the pod we run in."""

    kubeconfig: str = ""
    master: str = ""
    token_file: str = IN_CLUSTER_TOKEN
    ca_file: str = IN_CLUSTER_CA


class Loaded(typing.NamedTuple):
    """A usable configuration and what to call its credential in a message."""

    configuration: typing.Any
    credential: str


async def load(origin: Origin) -> Loaded:
    """Read the configuration from its origin, running its exec plugin if it has one."""
    if origin.kubeconfig:
        loaded = await _from_kubeconfig(origin.kubeconfig)
    elif origin.master:
        loaded = Loaded(slim.load().client.Configuration(), "a request without credentials")
    else:
        loaded = _from_pod(origin)
    if origin.master:
        loaded.configuration.host = origin.master.rstrip("/")
    _check_url(str(loaded.configuration.host))
    _take_user(loaded.configuration)
    return loaded


def check(kubeconfig: str, master: str) -> None:
    """Find what can not work, as far as that shows without running anything, before anything is set up."""
    if kubeconfig:
        import yaml  # noqa: PLC0415 - loaded only where it is read

        try:
            content = yaml.safe_load(pathlib.Path(kubeconfig).read_bytes())
        except OSError as error:
            raise _unusable(f"--kubeconfig: {kubeconfig}: {error.strerror or error}") from error
        except yaml.YAMLError as error:
            raise _unusable(f"--kubeconfig: {kubeconfig}: {_malformed(error)}") from None
        secrecy.keep_kubeconfig(content)
        if not isinstance(content, dict):
            raise _unusable(f"--kubeconfig: {kubeconfig}: not a usable kubeconfig")
    elif not master:
        _check_in_pod()
    if master:
        _check_url(master)


def _check_in_pod() -> None:
    if not os.environ.get("KUBERNETES_SERVICE_HOST"):
        raise _unusable("no API server: not in a pod, and no --kubeconfig, --master or --manifests")


def _check_url(host: str) -> None:
    if not host.startswith(("http://", "https://")):
        raise _unusable(f"{host!r} is not an http:// or https:// URL")
    try:
        urllib.parse.urlsplit(host).port  # noqa: B018 - it is looked at only now
    except ValueError as error:
        raise _unusable(f"{host!r}: {error}") from None


def _take_user(configuration: typing.Any) -> None:
    """Make a header of the user in a URL, where no other credential is there, as client-go does."""
    url = urllib.parse.urlsplit(configuration.host)
    user, at, place = url.netloc.rpartition("@")
    if not at:
        return
    configuration.host = urllib.parse.urlunsplit(url._replace(netloc=place))
    name, _, password = user.partition(":")
    secrecy.keep(urllib.parse.unquote(password))
    if "BearerToken" not in configuration.api_key:
        pair = ":".join(map(urllib.parse.unquote, (name, password)))
        configuration.api_key["BearerToken"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        _keep_token(configuration)


def _from_pod(origin: Origin) -> Loaded:
    library = slim.load()
    _check_in_pod()
    configuration = library.client.Configuration()
    try:
        library.config.load_incluster_config(
            client_configuration=configuration, token_filename=origin.token_file, cert_filename=origin.ca_file
        )
    except (library.config.ConfigException, OSError) as error:
        raise _unusable(f"in-cluster configuration: {error} ({origin.token_file})") from error
    _keep_token(configuration)
    reread = configuration.refresh_api_key_hook

    def refresh(current: typing.Any) -> None:
        try:
            reread(current)
        except Exception as error:
            # An empty file, one that is not text, …: the next request looks again.
            raise RefreshError(f"{origin.token_file}: {error or type(error).__name__}") from error
        # A newline at the end of the file must not end up in the header.
        current.api_key["BearerToken"] = current.api_key["BearerToken"].strip()
        _keep_token(current)

    configuration.refresh_api_key_hook = refresh
    return Loaded(configuration, f"the service account token in {origin.token_file}")


async def _from_kubeconfig(path: str) -> Loaded:
    import yaml  # noqa: PLC0415 - as above

    library = slim.load()
    # It logs what it also raises.
    logging.getLogger("kubernetes_asyncio.config.kube_config").setLevel(logging.CRITICAL)
    configuration = library.client.Configuration()
    try:
        # The library only warns about a file it can not read, then fails without naming it.
        content = await asyncio.to_thread(pathlib.Path(path).read_bytes)
        secrecy.keep_kubeconfig(yaml.safe_load(content))
        async with asyncio.timeout(EXEC_PLUGIN_TIMEOUT_S):
            loader = await library.config.load_kube_config(
                config_file=path, client_configuration=configuration, persist_config=False
            )
    except TimeoutError as error:
        raise _unusable(f"{path}: exec plugin: no answer in {EXEC_PLUGIN_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise _unusable(f"{error.filename or path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise _unusable(f"{path}: {_malformed(error)}") from None
    except binascii.Error as error:
        raise _unusable(f"{path}: a -data field is not base64: {error}") from error
    except library.config.ConfigException as error:
        raise _unusable(f"{path}: {error}") from error
    except _BROKEN_KUBECONFIG as error:
        raise _unusable(f"{path}: not a usable kubeconfig: {error or type(error).__name__}") from error
    _keep_token(configuration)
    if hasattr(loader, "exec_plugin_expiry"):
        configuration.refresh_api_key_hook = _exec_plugin_hook(path, loader)
    return Loaded(configuration, _credential_name(path, loader, configuration))


def _exec_plugin_hook(path: str, loader: typing.Any) -> typing.Any:
    """Return a hook that has the plugin make a new token before the current one expires."""
    running = asyncio.Lock()

    async def refresh(configuration: typing.Any) -> None:
        async with running:
            try:
                async with asyncio.timeout(EXEC_PLUGIN_TIMEOUT_S):
                    await loader.load_from_exec_plugin()
            except Exception as error:
                raise RefreshError(f"{path}: exec plugin: {error or type(error).__name__}") from error
        configuration.api_key["BearerToken"] = loader.token
        _keep_token(configuration)

    return refresh


def _credential_name(path: str, loader: typing.Any, configuration: typing.Any) -> str:
    context = (loader.current_context or {}).get("context", {})
    user = f"user {context.get('user', '(none)')!r} in {path}"
    if configuration.cert_file:
        return f"the client certificate of {user}"
    if hasattr(loader, "exec_plugin_expiry"):
        return f"the exec plugin's token of {user}"
    if "BearerToken" in configuration.api_key:
        return f"the token of {user}"
    return f"a request without credentials ({user} has none)"


def one_line(text: str) -> str:
    """Return the text without secrets, each run of white space, newlines included, made one space."""
    return " ".join(secrecy.without(text).split())


def _malformed(error: typing.Any) -> str:
    # Not all that the library says: it quotes the line, with the token that may be in it.
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark else ""
    return f"malformed YAML: {where}{getattr(error, 'problem', None) or type(error).__name__}"


def _keep_token(configuration: typing.Any) -> None:
    for token in configuration.api_key.values():
        if isinstance(token, str):
            secrecy.keep(token)


def _unusable(message: str) -> errors.ConfigError:
    return errors.ConfigError(one_line(message))
