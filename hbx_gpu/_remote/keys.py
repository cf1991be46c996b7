"""The names of storage options, which are those of obstore; an unknown one is refused with what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from hbx_gpu._advice import spelled
from hbx_gpu.errors import RemotePathError

CLIENT = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "default_content_type",
        "default_headers",
        "http1_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_url",
        "proxy_ca_certificate",
        "proxy_excludes",
        "root_certificate",
        "randomize_addresses",
        "read_timeout",
        "timeout",
        "user_agent",
    }
)
"""Options of connections, for every scheme. obstore takes them apart from those of a store."""

_S3 = frozenset(
    {
        "access_key_id",
        "checksum_algorithm",
        "conditional_put",
        "container_authorization_token_file",
        "container_credentials_full_uri",
        "container_credentials_relative_uri",
        "copy_if_not_exists",
        "default_region",
        "disable_bulk_delete",
        "disable_tagging",
        "endpoint",
        "imdsv1_fallback",
        "metadata_endpoint",
        "region",
        "request_payer",
        "role_arn",
        "role_session_name",
        "s3_express",
        "secret_access_key",
        "server_side_encryption",
        "session_token",
        "skip_signature",
        "sse_bucket_key_enabled",
        "sse_customer_key_base64",
        "sse_kms_key_id",
        "unsigned_payload",
        "virtual_hosted_style_request",
        "web_identity_token_file",
    }
)
_GCS = frozenset(
    {
        "application_credentials",
        "base_url",
        "bearer_token",
        "service_account",
        "service_account_key",
        "skip_signature",
    }
)
_AZURE = frozenset(
    {
        "account_key",
        "account_name",
        "authority_host",
        "client_id",
        "client_secret",
        "credential_type",
        "disable_tagging",
        "encryption_key",
        "endpoint",
        "fabric_cluster_identifier",
        "fabric_session_token",
        "fabric_token_service_url",
        "fabric_workload_host",
        "federated_token_file",
        "msi_endpoint",
        "msi_resource_id",
        "object_id",
        "sas_key",
        "skip_signature",
        "tenant_id",
        "token",
        "use_azure_cli",
        "use_emulator",
        "use_fabric_endpoint",
    }
)
_OF_SCHEME = {"s3": _S3, "gs": _GCS, "az": _AZURE, "http": frozenset[str](), "https": frozenset[str]()}
# As the variables of the environment and other programs call them.
_PREFIXES = ("aws_", "google_", "azure_storage_", "azure_")
_OTHER_NAMES = {
    "endpoint_url": "endpoint",
    "endpoint_url_s3": "endpoint",
    "access_key": "access_key_id",
    "secret_key": "secret_access_key",
}


def checked(scheme: str, options: Mapping[str, object]) -> dict[str, str]:
    """Options as obstore takes them: names in lower case, without the prefix of a provider; values as text.

    Parameters
    ----------
    scheme
        Of the address: one of ``SCHEMES`` of :mod:`hbx_gpu._remote.places`.
    options
        Name -> text, number or truth value.

    Raises
    ------
    RemotePathError
        A name is unknown, or a value is of another type. No value is repeated in the message.
    """
    known, out = _OF_SCHEME[scheme] | CLIENT, {}
    for given, value in options.items():
        name = _plain(str(given), known)
        if name not in known:
            raise RemotePathError(_unknown(scheme, str(given), known))
        if isinstance(value, bool):
            value = str(value).lower()
        if not isinstance(value, str | int | float):
            raise RemotePathError(
                f"storage option {name!r}: a text, a number or a truth value is expected, got a "
                f"{type(value).__name__}"
            )
        if name in out:
            raise RemotePathError(f"storage option {name!r} is given twice")
        out[name] = str(value)
    return out


def _plain(given: str, known: frozenset[str]) -> str:
    name = given.strip().lower().replace("-", "_")
    if name in known:
        return name
    for prefix in _PREFIXES:
        if (rest := name.removeprefix(prefix)) in known:
            return rest
        name = rest if rest in _OTHER_NAMES else name
    return _OTHER_NAMES.get(name, name)


def _unknown(scheme: str, given: str, known: frozenset[str]) -> str:
    near = difflib.get_close_matches(given.lower(), sorted(known), 1)
    meant = f"; did you mean {near[0]!r}?" if near else ";"
    own = sorted(_OF_SCHEME[scheme]) or sorted(CLIENT)
    more = " and those of connections, such as allow_http and timeout" if _OF_SCHEME[scheme] else ""
    what = spelled("storage_options", "--storage-option")
    return f"{what}: {scheme}:// has no option {given!r}{meant} Known are {', '.join(own)}{more}"
