"""How sinks reach servers: allowed addresses, a time for the whole, one POST."""

from .addresses import is_literal, is_private
from .exchange import AddressRefused, Exchange, failure, trusted, within_tls
from .post import Poster
from .url import HttpSettings

__all__ = [
    "AddressRefused",
    "Exchange",
    "HttpSettings",
    "Poster",
    "failure",
    "is_literal",
    "is_private",
    "trusted",
    "within_tls",
]
