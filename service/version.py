"""The product's version, as servers, reports and workers name it."""

from importlib import metadata

VERSION = metadata.version("tenet")
